"""The teacher: a chat model that labels, what it was paid for and kept, and labels at hand.

`labelling` is the step; `asking` asks with retries and a token limit, `answers` keeps what was paid
for, `providers` knows LangChain's models, `labels` reads aspect summaries.
"""

from finetune.teacher.answers import Answer, TokensSpent
from finetune.teacher.asking import Teacher, open_teacher, teacher_identity
from finetune.teacher.labelling import TeacherReport, label_aspects
from finetune.teacher.labels import read_aspects

__all__ = [
    "Answer",
    "Teacher",
    "TeacherReport",
    "TokensSpent",
    "label_aspects",
    "open_teacher",
    "read_aspects",
    "teacher_identity",
]

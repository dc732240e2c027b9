"""The teacher: a chat model that labels, what it was paid for and kept, and labels at hand.

`labelling` is the step; `asking` asks with retries and a token limit and keeps what was paid for,
`answers` counts what it cost, `providers` knows whom the settings name, `labels` reads aspect
summaries.
"""

from finetune.teacher.answers import TokensSpent
from finetune.teacher.asking import Teacher, open_teacher, teacher_identity
from finetune.teacher.labelling import TeacherReport, label_aspects
from r4r_graph.answers import Answer

__all__ = [
    "Answer",
    "Teacher",
    "TeacherReport",
    "TokensSpent",
    "label_aspects",
    "open_teacher",
    "teacher_identity",
]

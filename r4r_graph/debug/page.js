"use strict";
// The page works without this: it only adds buttons.
function button(label, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = label;
  made.addEventListener("click", () => act(made));
  return made;
}

async function copied(text, field) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    field.focus();
    field.select();
    return document.execCommand("copy");
  }
}

for (const field of document.querySelectorAll("textarea[data-copy]")) {
  const copy = button("Copy", async (made) => {
    made.textContent = (await copied(field.value, field)) ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { made.textContent = "Copy"; }, 2000);
  });
  field.before(copy);
}

for (const place of document.querySelectorAll("[data-unfold]")) {
  const folds = () => document.querySelectorAll(`#${place.dataset.unfold} details`);
  place.append(
    button("Open all", () => folds().forEach((fold) => { fold.open = true; })),
    button("Close all", () => folds().forEach((fold) => { fold.open = false; })),
  );
}

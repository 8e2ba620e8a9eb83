// What a mark says is shown beside it, under the pointer or with the keyboard's focus. Of each plot
// one mark is in the order of Tab; arrow keys go from mark to mark, Escape puts the note away.
"use strict";
const tip = document.getElementById("tip");
const marks = 'svg .role-mark [role="graphics-symbol"][aria-label]';

function show(mark) {
  const place = mark.getBoundingClientRect();
  tip.textContent = mark.getAttribute("aria-label");
  tip.hidden = false;
  const left = place.left + place.width / 2 - tip.offsetWidth / 2;
  const above = place.top - tip.offsetHeight - 6;
  tip.style.left = Math.max(8, Math.min(left, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = (above > 4 ? above : place.bottom + 6) + "px";
}

for (const plot of document.querySelectorAll("figure svg")) {
  const all = [...plot.querySelectorAll(marks)];
  if (all.length) all[0].setAttribute("tabindex", "0");
  plot.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const ends = { Home: 0, End: all.length - 1 };
    const here = all.indexOf(document.activeElement);
    const next = event.key in ends ? ends[event.key] : here + (steps[event.key] || 0);
    if (here < 0 || next === here || !all[next]) return;
    event.preventDefault();
    all[here].removeAttribute("tabindex");
    all[next].setAttribute("tabindex", "0");
    all[next].focus();
  });
}
for (const kind of ["pointerover", "focusin", "click"]) {
  document.addEventListener(kind, (event) => {
    const mark = event.target.closest(marks);
    if (mark) show(mark);
    else if (kind !== "focusin") tip.hidden = true;
  });
}
document.addEventListener("focusout", () => { tip.hidden = true; });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

// The inspector's keys. They rest while something is typed, with a modifier, and while the inspector is off the screen.

function isOnScreen(box) {
  const { top, bottom } = box.getBoundingClientRect();
  return top < window.innerHeight && bottom > 0;
}

function listenToKeys(inspector) {
  const actions = {
    ArrowLeft: () => inspector.move(-1),
    ArrowRight: () => inspector.move(1),
    n: () => inspector.moveByScore(1),
    p: () => inspector.moveByScore(-1),
    s: () => inspector.toggleSelected(),
    "[": () => inspector.moveResponse(-1),
    "]": () => inspector.moveResponse(1),
    "/": () => inspector.search.focus(),
    Escape: () => inspector.clearFilter(),
  };
  for (const k of [1, 2, 3, 4]) actions[k] = () => inspector.state.view.medians && inspector.toggleQuadrant(k);
  document.addEventListener("keydown", (event) => {
    if (!(event.target instanceof Element)) return;
    if (event.ctrlKey || event.metaKey || event.altKey || !isOnScreen(inspector.box)) return;
    if (event.target.matches("input[type=search]")) {
      if (event.key === "Enter" && inspector.hitStarts.length) inspector.nextHit();
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.target.matches("input[type=range], select, textarea")) return;
    if (event.target.matches("input[type=radio]") && event.key.startsWith("Arrow")) return;
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
}

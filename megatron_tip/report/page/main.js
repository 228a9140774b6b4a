// Tables are in the page as it is; figures and the inspector are made here.

function nextTurn() {
  return new Promise((resolve) => setTimeout(resolve));
}

async function addLibrary() {
  const script = document.createElement("script");
  script.textContent = await unpackedText("library");
  document.head.append(script);
}

async function drawAll(redraws) {
  for (const redraw of redraws) {
    await redraw();
    await nextTurn(); // the page stays usable meanwhile
  }
}

async function start() {
  const { runs, labels } = await unpackedJson("data");
  const inspected = document.getElementById("inspector") && runs.some((run) => run.views.length);
  if (inspected) {
    const inspector = new Inspector(runs, labels);
    await inspector.start();
    listenToKeys(inspector);
  }
  await addLibrary();
  const redraws = [curveFigures, shareFigures, planeFigures, timeFigures, timelineFigures, memoryFigures].flatMap((make) => make(runs));
  const theme = document.getElementById("theme");
  const redrawNow = () => redraws.forEach((redraw) => redraw());
  theme.addEventListener("change", () => {
    setTheme(theme.value);
    redrawNow();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawNow);
  document.getElementById("print").addEventListener("click", () => window.print());
  window.addEventListener("beforeprint", () => {
    setTheme("light");
    redrawNow();
  });
  window.addEventListener("afterprint", () => {
    setTheme(theme.value);
    redrawNow();
  });
  await drawAll(redraws);
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => {
  const failure = document.getElementById("failure");
  failure.hidden = false;
  failure.textContent = `The figures cannot be drawn: ${error.message}. They need a browser of 2023 or later (DecompressionStream).`;
  throw error;
});

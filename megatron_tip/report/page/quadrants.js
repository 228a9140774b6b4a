// TIP's quadrants: their shares by step, and the plane of tokens at one step.

const QUADRANTS = ["Q1", "Q2", "Q3", "Q4"];
const LEAST_DIVERGENCE = 1e-3;

function shareFigures(runs) {
  const parent = document.getElementById("share-figures");
  return runs.map((run) => {
    const place = frame(parent, run.name, "share of valid (left) and of supervised tokens (right) by step");
    return () => {
      const traces = [];
      ["", "kept_"].forEach((group, side) => {
        QUADRANTS.forEach((name, k) => {
          const metric = `selection/${group}q${k + 1}_share`;
          if (!has(run, metric)) return;
          const points = run.steps.map((step, i) => [step, run.metrics[metric][i]]).filter(([, share]) => share !== null);
          traces.push({
            type: points.length === 1 ? "bar" : "scatter",  // an area needs two steps
            mode: "lines",
            x: points.map(([step]) => step),
            y: points.map(([, share]) => share),
            name,
            legendgroup: name,
            showlegend: side === 0,
            xaxis: side ? "x2" : "x",
            stackgroup: group || "all",
            line: { width: 1, color: colour("surface") },
            marker: { color: colour(`quadrant-${k + 1}`) },
            fillcolor: colour(`quadrant-${k + 1}`),
            fillpattern: { shape: ["", "", "/", "."][k], fillmode: "overlay", fgcolor: colour("surface"), bgcolor: colour(`quadrant-${k + 1}`), size: 7, solidity: 0.18 },
            hovertemplate: "%{y:.1%}",
          });
        });
      });
      const layout = {
        barmode: "stack",
        bargap: 0.6,
        xaxis: { domain: [0, 0.48], ...stepAxis([run]) },
        xaxis2: { domain: [0.52, 1], ...stepAxis([run]) },
        yaxis: { range: [0, 1], tickformat: ".0%" },
      };
      drawOrSay(place, traces, layout, "quadrant shares not recorded: the rule asked for no statistics");
      place.note(traces.length && traces.length < 8 ? "Not recorded: shares of the supervised tokens" : "");
    };
  });
}

function planeTraces(view) {
  const { x, y, kept } = view.points;
  return [false, true].map((wanted) => {
    const chosen = x.map((_, i) => i).filter((i) => kept[i] === wanted);
    return {
      type: "scatter",
      mode: "markers",
      x: chosen.map((i) => x[i]),
      y: chosen.map((i) => Math.max(y[i], LEAST_DIVERGENCE)),
      name: wanted ? "supervised" : "not supervised",
      marker: wanted ? { symbol: "diamond", size: 7, color: colour("selected"), line: { width: 0.5, color: colour("surface") } } : { symbol: "circle-open", size: 5, color: colour("muted") },
      hovertemplate: "H(p) %{x:.2f}, divergence %{y:.3f}<extra></extra>",
    };
  });
}

function planeLayout(view, ranges) {
  const line = { color: colour("text"), width: 1, dash: "dash" };
  const shapes = [];
  const annotations = [];
  if (view.medians) {
    const [entropy, divergence] = view.medians;
    shapes.push({ type: "line", xref: "x", yref: "paper", x0: entropy, x1: entropy, y0: 0, y1: 1, line });
    shapes.push({ type: "line", xref: "paper", yref: "y", x0: 0, x1: 1, y0: divergence, y1: divergence, line });
    [[0.99, 0.99], [0.99, 0.01], [0.01, 0.99], [0.01, 0.01]].forEach(([x, y], k) => {
      annotations.push({ xref: "paper", yref: "paper", x, y, xanchor: x > 0.5 ? "right" : "left", yanchor: y > 0.5 ? "top" : "bottom", text: `<b>${QUADRANTS[k]}</b>`, showarrow: false, bgcolor: colour("surface") });
    });
  }
  return {
    hovermode: "closest",
    height: 360,
    shapes,
    annotations,
    xaxis: { title: { text: "student's entropy H(p), nats", standoff: 4 }, range: ranges.x },
    yaxis: { type: "log", title: { text: `${view.divergence.replaceAll("_", " ")}, nats, logarithmic`, standoff: 4 }, range: ranges.y, dtick: 1 },
  };
}

function planeFigures(runs) {
  const steps = [...new Set(runs.flatMap((run) => run.views.filter((view) => view.points.x.length).map((view) => view.step)))].sort((a, b) => a - b);
  const note = document.getElementById("plane-note");
  const row = document.getElementById("plane-step-row");
  if (!steps.length) {
    row.hidden = true;
    note.hidden = false;
    note.textContent = "No run has recorded the plane of tokens: tracking.view_every_steps turns it on.";
    return [];
  }
  const slider = document.getElementById("plane-step");
  slider.max = steps.length - 1;
  slider.value = steps.length - 1;
  row.hidden = steps.length === 1;
  const all = runs.flatMap((run) => run.views.map((view) => view.points));
  const most = (axis) => all.reduce((top, points) => points[axis].reduce((a, b) => Math.max(a, b), top), LEAST_DIVERGENCE);
  const ranges = { x: [0, most("x") * 1.03], y: [Math.log10(LEAST_DIVERGENCE) - 0.1, Math.log10(most("y")) + 0.15] };
  const places = runs.map((run) => frame(document.getElementById("plane-figures"), run.name, ""));
  const draw = () => {
    const step = steps[slider.value];
    document.getElementById("plane-step-shown").textContent = step;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    runs.forEach((run, r) => {
      const view = run.views.find((candidate) => candidate.step === step && candidate.points.x.length);
      const nothing = run.views.length ? `no view of step ${step}` : "no views: tracking.view_every_steps turns them on";
      drawOrSay(places[r], view ? planeTraces(view) : [], view ? planeLayout(view, ranges) : {}, nothing);
      const cut = view?.medians ? `Parted at the batch's medians: H(p) ${view.medians[0].toFixed(3)}, ${view.divergence.replaceAll("_", " ")} ${view.medians[1].toFixed(3)} nats. ` : "";
      places[r].note(view ? `${cut}${view.points.x.length} tokens of step ${step}; divergences below ${LEAST_DIVERGENCE} stand at ${LEAST_DIVERGENCE}.` : "");
    });
  };
  slider.addEventListener("input", draw);
  return [draw];
}

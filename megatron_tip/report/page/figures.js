// Curves of all runs, and time and memory by phase. A metric that a run lacks is a gap, named below its figure.

const CURVES = [
  { title: "Reverse KL, student to teacher", unit: "nats per token", log: true, series: [["train/reverse_kl", "rollouts"], ["train/topk_reverse_kl", "rollouts, top-K", true], ["heldout/reverse_kl", "held-out"], ["heldout/topk_reverse_kl", "held-out, top-K", true]] },
  { title: "Loss on the supervised tokens", unit: "nats", series: [["train/loss", ""]] },
  { title: "Entropy of the next token", unit: "nats", series: [["train/student_entropy", "student"], ["train/teacher_entropy", "teacher"]] },
  { title: "Divergence on both supports, D", unit: "nats", series: [["train/support_divergence", "all"], ["selection/kept_support_divergence_mean", "supervised", true]] },
  { title: "Compatibility, C", unit: "teacher's mass on the student's top-K", series: [["train/compatibility", "all"], ["selection/kept_compatibility_mean", "supervised", true]] },
  { title: "Tokens supervised", unit: "share of valid tokens", percent: true, series: [["selection/retention_ratio", ""]] },
  { title: "Gradient norm", unit: "before clipping", log: true, series: [["train/grad_norm", ""]] },
  { title: "Response length", unit: "tokens", series: [["rollout/response_tokens_mean", "mean"]] },
  { title: "Responses cut off", unit: "share", percent: true, series: [["rollout/truncated_ratio", ""]] },
];

function has(run, metric) {
  return (run.metrics[metric] ?? []).some((value) => value !== null);
}

// A figure's frame in `parent`: caption, drawing, note. Returns the drawing; `note` fills the last.
function frame(parent, title, unit) {
  const figure = document.createElement("figure");
  figure.className = "figure";
  const caption = document.createElement("figcaption");
  caption.append(Object.assign(document.createElement("strong"), { textContent: title }));
  if (unit) caption.append(Object.assign(document.createElement("span"), { textContent: unit }));
  const drawing = document.createElement("div");
  drawing.className = "drawing";
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", unit ? `${title}, ${unit}` : title);
  const note = Object.assign(document.createElement("p"), { className: "gap", hidden: true });
  figure.append(caption, drawing, note);
  parent.append(figure);
  return {
    drawing,
    unit(text) {
      caption.querySelector("span")?.replaceChildren(text);
    },
    note(text) {
      note.textContent = text;
      note.hidden = !text;
    },
  };
}

function drawOrSay(place, traces, layout, nothing) {
  if (traces.length) {
    place.drawing.classList.remove("empty");
    const height = traces.length > 4 && layout.barmode === undefined ? 350 : 300; // room for the legend
    return Plotly.react(place.drawing, traces, baseLayout({ height, ...layout }), PLOT_OPTIONS);
  }
  Plotly.purge(place.drawing);
  place.drawing.classList.add("empty");
  place.drawing.textContent = nothing;
  return null;
}

function curveTraces(runs, series) {
  const traces = [];
  const gaps = [];
  runs.forEach((run, r) => {
    series.forEach(([metric, label, optional], s) => {
      if (!has(run, metric)) {
        if (!optional) gaps.push(`${metric} in ${run.name}`);
        return;
      }
      const values = run.metrics[metric];
      const isMeasured = /^(heldout|diagnostics)\//.test(metric); // at steps of its own choosing
      const isSparse = isMeasured || values.filter((value) => value !== null).length < values.length / 2;
      traces.push({
        type: "scatter",
        x: run.steps,
        y: values,
        name: [runs.length > 1 ? run.name : "", label].filter(Boolean).join(", ") || run.name,
        mode: isSparse || s > 0 || values.length < 40 ? "lines+markers" : "lines",
        connectgaps: isSparse,
        line: { color: runColour(r), dash: s > 0 ? "dot" : DASHES[r], width: s > 0 ? 1.5 : 2 },
        marker: { symbol: MARKERS[(r + s) % MARKERS.length] + (s > 0 ? "-open" : ""), size: s > 0 ? 7 : 5, color: runColour(r) },
        opacity: 1,
      });
    });
  });
  return { traces, gaps };
}

// A logarithmic axis with round ticks, as many in a decade as there are few decades.
function logAxis(traces) {
  const values = traces.flatMap((trace) => trace.y).filter((value) => value !== null);
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const decades = Math.log10(most / least);
  const digits = decades > 2.5 ? [1] : decades > 1 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 7];
  const ticks = [];
  for (let decade = Math.floor(Math.log10(least)); decade <= Math.log10(most); decade++) {
    for (const digit of digits) ticks.push(digit * 10 ** decade);
  }
  return { type: "log", tickmode: "array", tickvals: ticks, ticktext: ticks.map((tick) => String(Number(tick.toPrecision(2)))) };
}

// Steps are whole numbers, and so are the ticks of their axis.
function stepAxis(runs) {
  const steps = runs.flatMap((run) => run.steps);
  const span = Math.max(...steps) - Math.min(...steps);
  return { title: { text: "step", standoff: 4 }, ...(span <= 12 ? { tickmode: "linear", tick0: 0, dtick: span <= 8 ? 1 : 2 } : { tickformat: "d" }) };
}

function drawCurve(place, runs, spec) {
  const { traces, gaps } = curveTraces(runs, spec.series);
  const positive = traces.every((trace) => trace.y.every((value) => value === null || value > 0));
  const isLog = Boolean(spec.log && positive);
  if (spec.unit) place.unit(isLog ? `${spec.unit}, logarithmic` : spec.unit);
  const yaxis = spec.percent ? { tickformat: ".0~%", rangemode: "tozero" } : isLog ? logAxis(traces) : {};
  const strides = runs.filter((run) => run.stride > 1).map((run) => `each point of ${run.name} is the mean of ${run.stride} steps`);
  drawOrSay(place, traces, { yaxis, xaxis: stepAxis(runs), showlegend: traces.length > 1 }, "not recorded by any run");
  place.note([gaps.length && traces.length ? `Not recorded: ${gaps.join("; ")}` : "", ...strides].filter(Boolean).join(". "));
}

function curveFigures(runs) {
  const parent = document.getElementById("curve-figures");
  const redraws = CURVES.map((spec) => {
    const place = frame(parent, spec.title, spec.unit);
    return () => drawCurve(place, runs, spec);
  });
  const select = document.getElementById("any-metric");
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.metrics).filter((name) => has(run, name))))].sort();
  select.append(...names.map((name) => new Option(name, name)));
  const anyPlace = frame(document.getElementById("any-figure"), "", "");
  const drawAny = () => drawCurve(anyPlace, runs, { series: [[select.value, ""]] });
  select.addEventListener("change", drawAny);
  return [...redraws, ...(names.length ? [drawAny] : [])];
}

function phasesOf(runs, area) {
  const found = new Set(runs.flatMap((run) => Object.keys(run.metrics)).filter((name) => name.startsWith(`${area}/`)));
  const names = [...found].map((name) => name.slice(area.length + 1).replace(/_(seconds|bytes)$/, ""));
  return [...PHASES.filter((phase) => names.includes(phase)), ...names.filter((phase) => !PHASES.includes(phase)).sort()];
}

function timeFigures(runs) {
  const parent = document.getElementById("time-figures");
  const phases = phasesOf(runs, "time");
  const total = (run) => Math.max(0, ...run.steps.map((_, i) => phases.reduce((sum, phase) => sum + (run.metrics[`time/${phase}_seconds`]?.[i] ?? 0), 0)));
  const totals = runs.map(total);
  // One scale for all, unless that would hide a run.
  const isShared = Math.max(...totals) < 6 * Math.min(...totals);
  const top = (r) => (isShared ? Math.max(...totals) : totals[r]) * 1.04 || 1;
  return runs.map((run, r) => {
    const place = frame(parent, run.name, "seconds by step, of the first worker");
    return () => {
      const traces = phases.filter((phase) => has(run, `time/${phase}_seconds`)).map((phase) => ({
        type: "bar",
        x: run.steps,
        y: run.metrics[`time/${phase}_seconds`],
        name: phase,
        marker: { color: colour(`phase-${phases.indexOf(phase) % 8}`), line: { width: 0 } },
      }));
      const layout = { barmode: "stack", legend: { ...baseLayout().legend, traceorder: "normal" }, bargap: run.steps.length > 60 ? 0 : 0.15, yaxis: { range: [0, top(r)] }, xaxis: stepAxis([run]) };
      drawOrSay(place, traces, layout, "no times recorded");
      place.note(isShared ? "" : "The runs' scales differ.");
    };
  });
}

function memoryFigures(runs) {
  const parent = document.getElementById("memory-figures");
  const phases = phasesOf(runs, "memory");
  const byPhase = frame(parent, "Memory by phase", "GB, the most over all steps, of the first worker: allocated on a GPU, else resident");
  const ofAll = frame(parent, "Memory over the run", "GB: GPU, of the worker that has most; host, of all workers");
  const largest = (values) => values.reduce((most, value) => (value !== null && value > most ? value : most), 0) / 1e9;
  const drawPhases = () => {
    const traces = [];
    const gaps = [];
    runs.forEach((run, r) => {
      const recorded = phases.filter((phase) => has(run, `memory/${phase}_bytes`));
      if (!recorded.length) return gaps.push(run.name);
      const y = recorded.map((phase) => largest(run.metrics[`memory/${phase}_bytes`]));
      traces.push({ type: "bar", x: recorded, y, name: run.name, marker: { color: runColour(r) }, hovertemplate: "%{y:.2f} GB" });
    });
    drawOrSay(byPhase, traces, { barmode: "group", xaxis: { type: "category" }, showlegend: runs.length > 1 }, "not recorded by any run");
    byPhase.note(gaps.length && traces.length ? `Not recorded: memory/… in ${gaps.join(", ")}` : "");
  };
  const drawAll = () => {
    const scaled = runs.map((run) => ({ ...run, metrics: Object.fromEntries(["gpu/memory_used_max_bytes", "host/rss_total_bytes"].filter((name) => has(run, name)).map((name) => [name, run.metrics[name].map((value) => value && value / 1e9)])) }));
    const { traces, gaps } = curveTraces(scaled, [["gpu/memory_used_max_bytes", "GPU", true], ["host/rss_total_bytes", "host"]]);
    drawOrSay(ofAll, traces, { yaxis: { rangemode: "tozero" }, xaxis: stepAxis(runs) }, "not recorded by any run; monitoring.every_seconds turns it on");
    ofAll.note(gaps.length && traces.length ? `Not recorded: ${gaps.join("; ")}` : "");
  };
  return [drawPhases, drawAll];
}

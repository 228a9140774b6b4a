// The phases of the first and last steps, one after the other; gaps between them are time that no phase accounts for.

function timelineTraces(run, phases) {
  const names = phases.filter((name) => run.timeline.some((step) => step.phases.some(([phase]) => phase === name)));
  return names.map((name) => {
    const bars = run.timeline.flatMap((step) => step.phases.filter(([phase]) => phase === name).map(([, start, seconds]) => ({ step: `step ${step.step}`, start, seconds })));
    return {
      type: "bar",
      orientation: "h",
      name,
      y: bars.map((bar) => bar.step),
      base: bars.map((bar) => bar.start),
      x: bars.map((bar) => bar.seconds),
      customdata: bars.map((bar) => [bar.start, bar.seconds]),
      hovertemplate: `${name}: %{customdata[1]:.3f} s, from %{customdata[0]:.3f} s on<extra></extra>`,
      marker: { color: colour(`phase-${phases.indexOf(name) % 8}`), line: { width: 0 } },
    };
  });
}

function timelineFigures(runs) {
  const note = document.getElementById("timeline-note");
  const without = runs.filter((run) => !run.timeline.length).map((run) => run.name);
  note.hidden = !without.length;
  note.textContent = `No time line of the phases was recorded by ${without.join(", ")}: monitoring.trace = true does.`;
  const known = phasesOf(runs, "time");
  const others = [...new Set(runs.flatMap((run) => run.timeline.flatMap((step) => step.phases.map(([phase]) => phase))))].filter((phase) => !known.includes(phase)).sort();
  return runs.filter((run) => run.timeline.length).map((run) => {
    const place = frame(document.getElementById("timeline-figures"), run.name, "time line of rank 0: seconds since the step's first phase");
    const leftOut = run.timeline.filter((step) => step.left_out).map((step) => `step ${step.step}: ${step.left_out} shorter phases are left out`);
    return () => {
      const steps = run.timeline.map((step) => `step ${step.step}`);
      const layout = {
        barmode: "overlay",
        bargap: 0.35,
        hovermode: "closest",
        height: Math.max(300, 140 + 32 * steps.length),
        xaxis: { title: { text: "seconds", standoff: 4 }, rangemode: "tozero" },
        yaxis: { type: "category", categoryorder: "array", categoryarray: steps, autorange: "reversed", showgrid: false },
      };
      drawOrSay(place, timelineTraces(run, [...known, ...others]), layout, "");
      place.note(leftOut.join("; "));
    };
  });
}

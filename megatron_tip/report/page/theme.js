// Colours: Okabe and Ito's, told apart with every kind of colour vision; runs differ by dash and marker as well.

const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const MARKERS = ["circle", "diamond", "square", "triangle-up", "x", "cross"];
const PHASES = ["rollout", "teacher", "score", "select", "train", "sync", "heldout", "save"];

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function runColour(run) {
  return colour(`run-${run}`);
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

function baseLayout(more = {}) {
  const axis = {
    gridcolor: colour("grid"),
    linecolor: colour("line"),
    zerolinecolor: colour("grid"),
    tickcolor: colour("line"),
    automargin: true,
    ticks: "outside",
    ticklen: 4,
  };
  const { xaxis = {}, yaxis = {}, xaxis2, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("text") },
    margin: { l: 48, r: 12, t: 30, b: 36 }, // above the data: the toolbar, 28 pixels
    height: 300,
    hovermode: "x unified",
    hoverlabel: { bgcolor: colour("surface"), bordercolor: colour("line"), font: { color: colour("text") } },
    legend: { orientation: "h", x: 0, y: -0.26, yanchor: "top", font: { size: 11 } },
    modebar: { color: colour("muted"), activecolor: colour("text"), bgcolor: "rgba(0,0,0,0)" },
    xaxis: { ...axis, showgrid: false, ...xaxis },
    yaxis: { ...axis, ...yaxis },
    ...(xaxis2 ? { xaxis2: { ...axis, showgrid: false, ...xaxis2 } } : {}),
    uirevision: "kept",
    ...rest,
  };
}

const PLOT_OPTIONS = { displayModeBar: "hover", displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

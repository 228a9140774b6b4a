// One response at a time, a span a token. Shades are classes, so that another shading touches class names alone.

const SHADES = 10;

function textOf(state, token) {
  return state.response.texts[token] ?? state.run.vocabulary.texts[state.decoded.places[token]];
}

class Inspector {
  constructor(runs, labels) {
    this.runs = runs;
    this.labels = labels; // of the statistics by name, in the order in which they are offered
    const recorded = new Set(runs.flatMap((run) => run.views.flatMap((view) => view.statistics)));
    this.known = Object.keys(labels).filter((name) => recorded.has(name)); // those that some view on the page has
    this.box = document.getElementById("inspector");
    this.text = document.getElementById("text");
    this.card = document.getElementById("card");
    this.select = Object.fromEntries(["run", "step", "response"].map((name) => [name, document.getElementById(`token-${name}`)]));
    this.search = document.getElementById("search");
    this.filter = { quadrants: new Set(), selected: false };
    this.shade = null;
    this.current = 0;
    this.spans = [];
    this.hits = [];
    this.asked = 0;
    this.state = null; // what is shown, whole: { run, view, response, decoded }
  }

  async start() {
    this.runs.forEach((run, r) => run.views.length && this.select.run.append(new Option(run.name, r)));
    this.select.run.addEventListener("change", () => this.showRun());
    this.select.step.addEventListener("change", () => this.showView());
    this.select.response.addEventListener("change", () => this.showResponse());
    document.getElementById("response-back").addEventListener("click", () => this.moveResponse(-1));
    document.getElementById("response-on").addEventListener("click", () => this.moveResponse(1));
    this.search.addEventListener("input", () => this.find());
    for (const event of ["mouseover", "focusin"]) {
      this.text.addEventListener(event, ({ target }) => this.look(target, event === "focusin"));
    }
    this.text.addEventListener("mouseleave", () => this.describe(this.current));
    this.buildFilter();
    await this.showRun();
    this.box.hidden = false; // not before there is something that it can act on
  }

  // Blocks are unpacked while the reader goes on: what was asked for last is what is shown.
  async latest(blocks) {
    const asked = ++this.asked;
    const found = await Promise.all(blocks);
    return asked === this.asked ? found : null;
  }

  async showRun() {
    const run = this.runs[this.select.run.value];
    this.select.step.replaceChildren(...run.views.map((view, v) => new Option(view.step, v)));
    const same = run.views.findIndex((view) => String(view.step) === this.shownStep);
    this.select.step.value = same >= 0 ? same : run.views.length - 1;
    await this.showView();
  }

  async showView() {
    const view = this.runs[this.select.run.value].views[this.select.step.value];
    this.shownStep = String(view.step);
    const label = (response) => `${response.title}: ${response.selected} of ${response.valid} tokens supervised, ${response.finish}`;
    const before = this.select.response.value || 0;
    this.select.response.replaceChildren(...view.responses.map((response, r) => new Option(label(response), r)));
    this.select.response.value = Math.min(before, view.responses.length - 1);
    await this.showResponse();
  }

  say() {
    const { run, view } = this.state;
    const notes = [];
    if (run.left_out) notes.push(`${run.left_out} more views of this run were left out to keep the file small.`);
    if (!view.statistics.length) notes.push("This view has no statistics: the run scored no tokens at this step.");
    if (view.statistics.length && !view.medians) notes.push("This view has no quadrants: the batch's medians were not recorded.");
    const lacking = this.known.filter((name) => !view.statistics.includes(name));
    if (view.statistics.length && lacking.length) notes.push(`Not recorded in this view: ${lacking.map((name) => this.labels[name].symbol).join(", ")}.`);
    notes.push(`Rule ${view.rule}, budget ${percent(view.retention_ratio)}, temperature ${view.temperature}.`);
    if (view.medians) notes.push(`Quadrants part at the batch's medians: H(p) ${view.medians[0].toFixed(3)}, ${view.divergence.replaceAll("_", " ")} ${view.medians[1].toFixed(3)} nats.`);
    const { most, least, coarse } = view.detail;
    if (coarse) notes.push(`To keep the file small, values are exact to 2 percent, and at most ${most} candidates above ${percent(least)} are shown a token; megatron-tip report --max-megabytes allows more.`);
    else notes.push("Values are rounded to thousandths.");
    const note = document.getElementById("token-note");
    note.textContent = notes.join(" ");
    note.hidden = false;
  }

  async showResponse() {
    const run = this.runs[this.select.run.value];
    const view = run.views[this.select.step.value];
    const response = view.responses[this.select.response.value];
    const vocabulary = typeof run.vocabulary === "number" ? unpackedJson(`block-${run.vocabulary}`) : run.vocabulary;
    const found = await this.latest([vocabulary, unpacked(`block-${response.block}`)]);
    if (!found) return;
    run.vocabulary = found[0];
    const isOtherView = this.state?.view !== view;
    this.state = { run, view, response, decoded: decodeResponse(found[1], response, view) };
    if (isOtherView) {
      this.buildShades();
      this.say();
    }
    document.getElementById("prompt").textContent = response.prompt;
    const spans = document.createDocumentFragment();
    for (let token = 0; token < response.tokens; token++) {
      const span = document.createElement("span");
      span.dataset.token = token;
      span.setAttribute("role", "option");
      span.tabIndex = -1;
      span.textContent = textOf(this.state, token) || "◦";
      spans.append(span);
    }
    this.text.replaceChildren(spans);
    this.spans = [...this.text.children];
    this.current = 0;
    this.rank();
    this.paint();
    this.paintFilter();
    this.find();
    if (response.tokens) this.go(Math.max(0, this.decodedOrder()[0] ?? 0), { focus: false });
    else this.card.replaceChildren(element("p", "quiet", "An empty response."));
  }

  // Tokens by score, the highest first; without one, by what is shaded.
  rank() {
    const { decoded } = this.state;
    const values = decoded.statistics.score ?? decoded.statistics[this.shade];
    const known = Array.from({ length: decoded.n }, (_, token) => token).filter((token) => decoded.flags[token] & 2);
    this.order = values ? known.filter((token) => !Number.isNaN(values[token])).sort((a, b) => values[b] - values[a] || a - b) : known;
  }

  decodedOrder() {
    return this.order.filter((token) => this.passes(token));
  }

  passes(token) {
    const flags = this.state.decoded.flags[token];
    if (this.filter.selected && !(flags & 1)) return false;
    return !this.filter.quadrants.size || this.filter.quadrants.has(flags >> 2);
  }

  paint() {
    const { decoded } = this.state;
    const values = decoded.statistics[this.shade];
    const scale = this.scale();
    const hits = new Set(this.hits);
    this.spans.forEach((span, token) => {
      const flags = decoded.flags[token];
      const value = values ? values[token] : NaN;
      const classes = ["token"];
      if (!Number.isNaN(value)) classes.push(`shade-${Math.min(SHADES - 1, Math.max(0, Math.floor((SHADES * value) / scale)))}`);
      if (flags & 1) classes.push("is-selected");
      if (!(flags & 2)) classes.push("not-valid");
      if (!this.passes(token)) classes.push("dimmed");
      if (hits.has(token)) classes.push("hit");
      if (token === this.current) classes.push("current");
      span.className = classes.join(" ");
    });
    this.paintLegend(scale);
  }

  scale() {
    const { view } = this.state;
    if (this.labels[this.shade]?.unit === "share") return 1;
    return view.scales[view.statistics.indexOf(this.shade)] || 1;
  }

  paintLegend(scale) {
    const legend = document.getElementById("legend");
    legend.replaceChildren();
    if (this.shade) {
      legend.append(element("span", "", "0"), ...Array.from({ length: SHADES }, (_, k) => element("span", `swatch shade-${k}`, "\u00a0")), element("span", "", `${scale.toFixed(2)}${scale === 1 ? "" : " and above"} · ${this.labels[this.shade].meaning}`));
    }
    legend.append(element("span", "token is-selected", "supervised"), element("span", "token not-valid", "environment or not valid"));
  }

  buildShades() {
    const field = document.getElementById("shade");
    const found = Object.keys(this.labels).filter((name) => this.state.view.statistics.includes(name));
    if (!found.includes(this.shade)) this.shade = found[0] ?? null;
    const legend = field.querySelector("legend");
    field.replaceChildren(legend);
    for (const name of [...found, null]) {
      const label = element("label");
      const radio = Object.assign(element("input"), { type: "radio", name: "shade", value: name ?? "none", checked: name === this.shade });
      radio.addEventListener("change", () => {
        this.shade = name;
        this.rank();
        this.paint();
      });
      const text = element("span", "", name ? this.labels[name].symbol : "none");
      if (name) text.title = this.labels[name].meaning;
      label.append(radio, text);
      field.append(label);
    }
  }

  buildFilter() {
    const field = document.getElementById("filter");
    const chip = (id, name, change) => {
      const button = Object.assign(element("button", "toggle", name), { type: "button", id });
      button.addEventListener("click", change);
      field.append(button);
      return button;
    };
    this.chips = QUADRANTS.map((name, k) => chip(`filter-${name}`, name, () => this.toggleQuadrant(k + 1)));
    this.selectedChip = chip("filter-selected", "supervised", () => this.toggleSelected());
  }

  toggleQuadrant(quadrant) {
    const { quadrants } = this.filter;
    if (!quadrants.delete(quadrant)) quadrants.add(quadrant);
    this.paintFilter();
    this.paint();
  }

  toggleSelected() {
    this.filter.selected = !this.filter.selected;
    this.paintFilter();
    this.paint();
  }

  clearFilter() {
    this.filter = { quadrants: new Set(), selected: false };
    this.search.value = "";
    this.find();
    this.paintFilter();
    this.paint();
  }

  paintFilter() {
    const { response, view } = this.state;
    this.chips.forEach((chip, k) => {
      chip.textContent = view.medians ? `${QUADRANTS[k]} · n = ${response.quadrants[k]}` : QUADRANTS[k];
      chip.disabled = !view.medians;
      chip.setAttribute("aria-pressed", this.filter.quadrants.has(k + 1));
    });
    this.selectedChip.textContent = `supervised · n = ${response.selected}`;
    this.selectedChip.setAttribute("aria-pressed", this.filter.selected);
  }

  look(target, isFocus) {
    const token = Number(target.dataset?.token ?? NaN);
    if (Number.isNaN(token)) return;
    if (isFocus && token !== this.current) this.mark(token);
    this.describe(token);
  }

  describe(token) {
    if (this.spans[token]) showCard(this.card, this.state, token, this.labels);
  }

  mark(token) {
    this.spans[this.current]?.classList.remove("current");
    if (this.spans[this.current]) this.spans[this.current].tabIndex = -1;
    this.current = token;
    this.spans[token].classList.add("current");
    this.spans[token].tabIndex = 0;
  }

  go(token, { focus = true } = {}) {
    if (token === undefined || !this.spans[token]) return;
    this.mark(token);
    if (focus) {
      this.spans[token].focus({ preventScroll: true });
      this.spans[token].scrollIntoView({ block: "nearest" });
    }
    this.describe(token);
  }

  move(by) {
    this.go(Math.min(this.spans.length - 1, Math.max(0, this.current + by)));
  }

  // The next (by = 1) or previous one by score, of those that are not filtered out.
  moveByScore(by) {
    const order = this.decodedOrder();
    const place = order.indexOf(this.current);
    this.go(order[place < 0 ? 0 : (place + by + order.length) % order.length]);
  }

  moveResponse(by) {
    const { response } = this.select;
    const next = Number(response.value) + by;
    if (next < 0 || next >= response.options.length) return;
    response.value = next;
    this.showResponse();
  }

  find() {
    const wanted = this.search.value.toLowerCase();
    this.hits = [];
    this.hitStarts = [];
    if (wanted) {
      const pieces = this.spans.map((_, token) => textOf(this.state, token).toLowerCase());
      const text = pieces.join("");
      const starts = [];
      pieces.reduce((offset, piece) => (starts.push(offset), offset + piece.length), 0);
      let token = 0;
      for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
        while (starts[token] + pieces[token].length <= at) token++;
        this.hitStarts.push(token);
        for (let k = token; k < pieces.length && starts[k] < at + wanted.length; k++) this.hits.push(k);
      }
    }
    document.getElementById("search-count").textContent = wanted ? `${this.hitStarts.length} hit${this.hitStarts.length === 1 ? "" : "s"}` : "";
    if (this.spans.length) this.paint();
  }

  nextHit() {
    this.go(this.hitStarts.find((token) => token > this.current) ?? this.hitStarts[0], { focus: false });
    this.spans[this.current].scrollIntoView({ block: "nearest" });
  }
}

// The card beside the text: one token's statistics, and both models' likeliest tokens.

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function percent(share) {
  return share >= 0.9995 ? "100 %" : share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
}

function tokenLabel(text) {
  return text === "" ? "(part of a character)" : text.replaceAll(" ", "␣").replaceAll("\n", "");
}

function candidateList(title, found, other, sampled, run) {
  const box = element("div", "candidates");
  box.append(element("h4", "", title));
  if (!found.length) {
    box.append(element("p", "quiet", "none recorded"));
    return box;
  }
  const elsewhere = new Set(other.map((candidate) => candidate.place));
  const list = element("ol");
  for (const { place, share } of found) {
    const item = element("li", place === sampled ? "sampled" : "");
    const bar = element("span", "share");
    bar.style.width = `${Math.max(1, 100 * share)}%`;
    const label = element("span", "token-name", tokenLabel(run.vocabulary.texts[place]));
    label.title = `id ${run.vocabulary.ids[place]}`;
    item.append(bar, label, element("span", "both", elsewhere.has(place) ? "•" : ""), element("span", "value", percent(share)));
    list.append(item);
  }
  box.append(list);
  const rest = 1 - found.reduce((sum, candidate) => sum + candidate.share, 0);
  box.append(element("p", "quiet", `all others: ${percent(Math.max(0, rest))}`));
  return box;
}

// `labels`: what the page calls each statistic; those of the sampled token alone have none.
function showCard(card, state, token, labels) {
  const { run, view, response, decoded } = state;
  const flags = decoded.flags[token];
  const quadrant = flags >> 2;
  const place = decoded.places[token];
  card.replaceChildren();
  const head = element("h3", "", tokenLabel(textOf(state, token)));
  const facts = element("p", "facts", `position ${token} of ${response.tokens} · id ${run.vocabulary.ids[place]}`);
  const chips = element("p", "chips");
  chips.append(element("span", flags & 1 ? "chip is-selected" : "chip", flags & 1 ? "supervised" : flags & 2 ? "not supervised" : "written by the environment, or not valid"));
  if (quadrant) chips.append(element("span", "chip", QUADRANTS[quadrant - 1]));
  card.append(head, facts, chips);
  const values = element("dl");
  for (const name of view.statistics) {
    if (!(name in labels)) continue;
    const value = decoded.statistics[name][token];
    const { symbol, meaning } = labels[name];
    const pair = element("div");
    pair.title = meaning;
    pair.append(element("dt", "", symbol), element("dd", "", Number.isNaN(value) ? "–" : value.toFixed(3)));
    values.append(pair);
  }
  card.append(values);
  const logprobs = ["student_logprobs", "teacher_logprobs"].map((name) => decoded.statistics[name]?.[token]);
  if (logprobs.some((value) => value !== undefined && !Number.isNaN(value))) {
    const [p, q] = logprobs.map((value) => (value === undefined || Number.isNaN(value) ? "–" : percent(Math.exp(value))));
    card.append(element("p", "facts", `This token: student ${p}, teacher ${q}`));
  }
  const [students, teachers] = [0, 1].map((model) => decoded.candidates(model, token));
  if (students.length || teachers.length) {
    const both = element("div", "both-models");
    both.append(candidateList("Student", students, teachers, place, run), candidateList("Teacher", teachers, students, place, run));
    card.append(both, element("p", "quiet", `• in both lists · framed: the sampled token · tokens below ${percent(view.detail.least)} are left out`));
  } else {
    card.append(element("p", "quiet", "No candidates of this token: the view has none, or they were left out to keep the file small."));
  }
}

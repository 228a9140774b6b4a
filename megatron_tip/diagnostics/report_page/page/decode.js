// The inverse of packing.py and tokens.py.

const MISSING = 0xffff;

async function unpacked(elementId) {
  const text = document.getElementById(elementId).textContent.trim();
  const deflated = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([deflated]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function unpackedText(elementId) {
  return new TextDecoder().decode(await unpacked(elementId));
}

async function unpackedJson(elementId) {
  return JSON.parse(await unpackedText(elementId));
}

class PlaneReader {
  constructor(bytes) {
    this.bytes = bytes;
    this.offset = 0;
  }

  // `count` integers whose bytes lie in `width` planes, the lowest first.
  integers(count, width) {
    const values = new Uint32Array(count);
    for (let plane = 0; plane < width; plane++) {
      for (let i = 0; i < count; i++) values[i] |= this.bytes[this.offset + i] << (8 * plane);
      this.offset += count;
    }
    return values;
  }
}

// One response of a view: places in the vocabulary, flags, statistics in nats (NaN: not known), both models' candidates.
function decodeResponse(bytes, response, view) {
  const n = response.tokens;
  const reader = new PlaneReader(bytes);
  const places = reader.integers(n, 3);
  const flags = reader.integers(n, 1);
  const statistics = {};
  for (const name of view.statistics) {
    const sign = name.endsWith("logprobs") ? -1 : 1;
    statistics[name] = Float32Array.from(reader.integers(n, 2), (value) => (value === MISSING ? NaN : (sign * value) / 1000));
  }
  const counts = [reader.integers(n, 1), reader.integers(n, 1)];
  const total = counts[0].reduce((a, b) => a + b, 0) + counts[1].reduce((a, b) => a + b, 0);
  const candidatePlaces = reader.integers(total, 3);
  const shares = reader.integers(total, 2);
  let next = 0;
  const starts = counts.map((count) => Array.from(count, (length) => (next += length) - length));
  const candidates = (model, token) => {
    const found = [];
    for (let i = starts[model][token]; i < starts[model][token] + counts[model][token]; i++) {
      found.push({ place: candidatePlaces[i], share: shares[i] / 10000 });
    }
    return found;
  };
  return { n, places, flags, statistics, candidates };
}

// The inverse of packing.py and tokens.py.

const MISSING = 0xffff;
const COARSE_MISSING = 0xff;
const [LEAST, MOST] = [1e-3, 65.534];
const SAMPLED = 0;
const ELSEWHERE = 255;

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

function fromCoarse(code) {
  if (code === COARSE_MISSING) return NaN;
  return code === 0 ? 0 : LEAST * (MOST / LEAST) ** ((code - 1) / (COARSE_MISSING - 2));
}

// One response of a view: places in the vocabulary, flags, statistics in nats (NaN: not known), both models' candidates.
function decodeResponse(bytes, response, view) {
  const n = response.tokens;
  const { coarse } = view.detail;
  const reader = new PlaneReader(bytes);
  const places = reader.integers(n, 3);
  const flags = reader.integers(n, 1);
  const statistics = {};
  for (const name of view.statistics) {
    const sign = name.endsWith("logprobs") ? -1 : 1;
    statistics[name] = Float32Array.from(reader.integers(n, coarse ? 1 : 2), (code) => sign * (coarse ? fromCoarse(code) : code === MISSING ? NaN : code / 1000));
  }
  const counts = [reader.integers(n, 1), reader.integers(n, 1)];
  const total = counts[0].reduce((a, b) => a + b, 0) + counts[1].reduce((a, b) => a + b, 0);
  const codes = reader.integers(total, 1);
  const shares = Float32Array.from(reader.integers(total, coarse ? 1 : 2), (code) => (coarse ? (code / 255) ** 2 : code / 10000));
  const elsewhere = reader.integers(codes.filter((code) => code === ELSEWHERE).length, 3);
  const candidatePlaces = new Uint32Array(total);
  const starts = counts.map(() => new Uint32Array(n));
  let next = 0;
  let nextElsewhere = 0;
  counts.forEach((count, model) => {
    for (let token = 0; token < n; token++) {
      starts[model][token] = next;
      for (let end = next + count[token]; next < end; next++) {
        const code = codes[next];
        if (code === SAMPLED) candidatePlaces[next] = places[token];
        else if (code === ELSEWHERE) candidatePlaces[next] = elsewhere[nextElsewhere++];
        else candidatePlaces[next] = candidatePlaces[starts[0][token] + code - 1];
      }
    }
  });
  const candidates = (model, token) =>
    Array.from({ length: counts[model][token] }, (_, rank) => {
      const at = starts[model][token] + rank;
      return { place: candidatePlaces[at], share: shares[at] };
    });
  return { n, places, flags, statistics, candidates };
}

// Files of adapters, as far as the tests look into them.

/** The tensors of a file, of f32, f16 or bf16, as numbers. */
export function read(bytes) {
  const length = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.subarray(8, 8 + length).toString());
  delete header.__metadata__;
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets }] of Object.entries(header)) {
    const [start, end] = data_offsets.map((at) => 8 + length + at);
    tensors[name] = { dtype, shape, values: numbers(dtype, bytes.subarray(start, end)) };
  }
  return tensors;
}

function numbers(dtype, bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (dtype === "F32") return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
  const wide = new DataView(new ArrayBuffer(4));
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => {
    const bits = view.getUint16(2 * i, true);
    if (dtype === "BF16") {
      wide.setUint32(0, bits << 16);
      return wide.getFloat32(0);
    }
    const [exponent, fraction] = [(bits >> 10) & 31, bits & 1023];
    const size = exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15);
    return bits >> 15 ? -size : size;
  });
}

/** B · A of every layer, by the name of the layer. */
function updates(tensors) {
  const all = {};
  for (const [name, a] of Object.entries(tensors)) {
    const [down, up] = name.includes("lora_A") ? ["lora_A", "lora_B"] : ["lora_down", "lora_up"];
    if (!name.includes(down)) continue;
    const b = tensors[name.replace(down, up)];
    const alpha = down === "lora_A" ? undefined : tensors[name.replace(/\.lora_down.*/, ".alpha")]?.values[0];
    const [rank, input] = a.shape;
    const update = new Float64Array(b.shape[0] * input);
    for (let i = 0; i < b.shape[0]; i++)
      for (let r = 0; r < rank; r++) {
        const factor = b.values[i * rank + r] * (alpha === undefined ? 1 : alpha / rank);
        for (let j = 0; j < input; j++) update[i * input + j] += factor * a.values[r * input + j];
      }
    all[name] = update;
  }
  return all;
}

/** How far the update of a layer is off at most, by its norm; and how far it may be for the types of the files. */
export function difference(found, expected) {
  const [x, y] = [read(found), read(expected)];
  if (Object.keys(x).join() !== Object.keys(y).join()) return { worst: Infinity, why: "other tensors", toString: () => "other tensors" };
  const [u, v] = [updates(x), updates(y)];
  let worst = 0;
  for (const [name, update] of Object.entries(u)) {
    let [off, norm] = [0, 0];
    update.forEach((value, i) => {
      off += (value - v[name][i]) ** 2;
      norm += v[name][i] ** 2;
    });
    worst = Math.max(worst, Number.isFinite(off) ? Math.sqrt(off / (norm || 1)) : Infinity);
  }
  const coarsest = Math.max(...Object.values(x).map(({ dtype }) => ({ F32: 2e-5, F16: 2e-3, BF16: 1.6e-2 })[dtype] ?? Infinity));
  return { worst, tolerance: coarsest, toString: () => `a layer is off by ${worst}` };
}

/** Modules of FLUX.1 by their names, each with its widths. */
export function flux() {
  const [d, wide] = [3072, 12288];
  const modules = [];
  const add = (name, input, output) => modules.push([`transformer.${name}`, input, output]);
  for (let i = 0; i < 19; i++) {
    const block = `transformer_blocks.${i}`;
    for (const name of ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"])
      add(`${block}.attn.${name}`, d, d);
    for (const ff of ["ff", "ff_context"]) {
      add(`${block}.${ff}.net.0.proj`, d, wide);
      add(`${block}.${ff}.net.2`, wide, d);
    }
  }
  for (let i = 0; i < 38; i++) {
    const block = `single_transformer_blocks.${i}`;
    for (const name of ["to_q", "to_k", "to_v"]) add(`${block}.attn.${name}`, d, d);
    add(`${block}.proj_mlp`, d, wide);
    add(`${block}.proj_out`, d + wide, d);
  }
  return modules;
}

/** The first bytes of a file of f16 factors for these modules, and the bytes of the whole. */
export function headOf(modules, rank) {
  const header = {};
  let end = 0;
  const add = (name, shape) => {
    const bytes = 2 * shape[0] * shape[1];
    header[name] = { dtype: "F16", shape, data_offsets: [end, end + bytes] };
    end += bytes;
  };
  for (const [name, input, output] of modules) {
    add(`${name}.lora_A.weight`, [rank, input]);
    add(`${name}.lora_B.weight`, [output, rank]);
  }
  let text = JSON.stringify(header);
  text = text.padEnd(Math.ceil(text.length / 8) * 8);
  const head = Buffer.alloc(8 + text.length);
  head.writeBigUInt64LE(BigInt(text.length));
  head.write(text, 8);
  return { head, bytes: head.length + end };
}

/** A LoRA of numbers that a seed gives. */
export function makeLora(modules, rank, seed) {
  const { head, bytes } = headOf(modules, rank);
  const file = Buffer.alloc(bytes);
  head.copy(file);
  let state = seed;
  for (let at = head.length; at < bytes; at += 2) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    // A sign, an exponent of 2^-6 to 2^-3, and a fraction.
    file.writeUInt16LE(((state >>> 16) & 0x83ff) | ((9 + ((state >>> 8) & 3)) << 10), at);
  }
  return file;
}

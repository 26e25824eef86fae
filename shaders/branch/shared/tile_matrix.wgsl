// A tile of Z·B_catᵀ on matrix units, for adapters with 16×16×16 f16 to f32 matrices and subgroups of 32: 16 tokens ×
// 64 channels for each subgroup of a workgroup. Z becomes halves that stay in workgroup memory, each row brought into
// f16's range; B_cat's come from branch/split_b.wgsl, a tile ahead. The products of two low parts are left out. The unit's
// accumulator truncates, which over 128 columns stays within f32's accuracy.
//
// Each 8 lanes share a row: lane i has channels 4·i .. + 4 and 32 + 4·i .. + 4 of rows i / 8, + 4, + 8 and + 12, so
// that neighbours read neighbouring memory and meet in no bank.
// Bindings: 3 B_cat, 4 Z. The permutation sets DEPTH, the most columns that a product has (32, 64 or 128), LOW, whether
// B_cat has low parts, and SUBGROUPS. `features` is of the type of F0, `multiply` on
// units or in software.

// B_cat: high parts of all rows, then low ones.
@group(0) @binding(3) var<storage, read> b_halves: array<vec4<f16>>;
@group(0) @binding(4) var<storage, read> values: array<f32>;

const SUBGROUP_TOKENS: u32 = 16u;
const THREADS: u32 = SUBGROUPS * 32u;
const TOKENS: u32 = SUBGROUPS * SUBGROUP_TOKENS;
const CHANNELS: u32 = 64u;

// Rows of halves and of sums, in vectors of 4. Padded, they keep the loads of a matrix from meeting in a bank.
const STRIDE: u32 = DEPTH / 4u + 2u;
const OUT_STRIDE: u32 = CHANNELS / 4u + 2u;
// One array, so that every part of it lies on 16 bytes, which loads of matrices need.
const Z_LOW: u32 = TOKENS * STRIDE;
const B_HIGH: u32 = 2u * Z_LOW;
const B_LOW: u32 = B_HIGH + CHANNELS * STRIDE;
const HALVES: u32 = B_LOW + select(0u, CHANNELS * STRIDE, LOW);
var<workgroup> halves: array<vec4<f16>, HALVES>;
var<workgroup> sums: array<vec4<f32>, TOKENS * OUT_STRIDE>;

// Vectors of B_cat that a thread fetches for a tile.
const FETCHES: u32 = CHANNELS * DEPTH / 4u / THREADS;

// Vectors that a lane has of each of its rows of Z.
const QUADS: u32 = DEPTH / 32u;

var<private> fetched_high: array<vec4<f16>, FETCHES>;
var<private> fetched_low: array<vec4<f16>, FETCHES>;

// Columns of a product, multiples of 16, in the rows of Z's and B_cat's halves.
struct Columns {
    first: u32,
    count: u32,
}

// Puts Z's columns into `halves`; gives what undoes the powers of two of the lane's rows, and B_cat's.
fn stage_z(job: Job, columns: Columns, first_token: u32) -> vec4<f32> {
    let slot = subgroup * 16u + lane / 8u;
    var z: array<vec4<f32>, 4u * QUADS>;
    for (var i = 0u; i < QUADS; i++) {
        let column = columns.first + lane % 8u * 4u + i * 32u;
        if (column < columns.first + columns.count) {
            let branch = branch_of(column);
            let k = column - jobs[0].column_starts[branch];
            let first = jobs[0].starts[branch];
            let rank = jobs[0].starts[branch + 1u] - first;
            for (var row = 0u; row < 4u; row++) {
                // Beyond the last token anything will do.
                let token = min(first_token + slot + row * 4u, job.first + job.count - 1u);
                z[i * 4u + row] = quad(token * job.rank + first, 1u, k, rank);
            }
        }
    }
    var inverse: vec4<f32>;
    for (var row = 0u; row < 4u; row++) {
        var most = vec4<u32>(0u);
        for (var i = 0u; i < QUADS; i++) {
            most = max(most, exponents(bitcast<vec4<u32>>(z[i * 4u + row])));
        }
        let scale = min(scale_of_row(most, 8u), MOST_SCALE);
        for (var i = 0u; i < QUADS; i++) {
            let place = (slot + row * 4u) * STRIDE + lane % 8u + i * 8u;
            let parts = split(z[i * 4u + row] * scale);
            halves[place] = parts.high;
            halves[Z_LOW + place] = parts.low;
        }
        inverse[row] = inverse_of(scale) / B_SCALE;
    }
    return inverse;
}

// The fragment of a tile that holds a vector, of those from left to right and then down, and its row and quad in there.
struct Slot {
    down: u32,
    right: u32,
    row: u32,
    quad: u32,
}

fn slot_of(vector: u32) -> Slot {
    let fragment = vector / 64u;
    return Slot(fragment / (DEPTH / 16u), fragment % (DEPTH / 16u), vector % 64u / 4u, vector % 4u);
}

// Fetches B_cat of CHANNELS channels, as branch/split_b.wgsl lays it out. Beyond the last column anything will do: it is not
// multiplied.
fn fetch_b(job: Job, columns: Columns, channel: u32) {
    let low = (job.width + CHANNELS - 1u) / CHANNELS * CHANNELS * job.columns / 4u;
    for (var i = 0u; i < FETCHES; i++) {
        let slot = slot_of(t + i * THREADS);
        let right = columns.first / 16u + min(slot.right, max(columns.count / 16u, 1u) - 1u);
        let fragment = (channel / 16u + slot.down) * (job.columns / 16u) + right;
        let source = fragment * 64u + slot.row * 4u + slot.quad;
        fetched_high[i] = b_halves[source];
        if (LOW) {
            fetched_low[i] = b_halves[low + source];
        }
    }
}

// `sums` become Z·B_catᵀ of what was fetched; `next`: the channel from which on to fetch then. Every thread calls it.
fn tile_product(job: Job, columns: Columns, next: u32) {
    for (var i = 0u; i < FETCHES; i++) {
        let slot = slot_of(t + i * THREADS);
        let place = (slot.down * 16u + slot.row) * STRIDE + slot.right * 4u + slot.quad;
        halves[B_HIGH + place] = fetched_high[i];
        if (LOW) {
            halves[B_LOW + place] = fetched_low[i];
        }
    }
    workgroupBarrier();
    fetch_b(job, columns, next);
    multiply(columns.count);
    workgroupBarrier();
}

// A lane's part of a row: 8 channels of F0 and of the product.
struct Part {
    // The first vector of 4 channels in F0.
    place: u32,
    // The first vector of the product in `sums`.
    at: u32,
    // What the product is multiplied by.
    factor: f32,
}

struct Channels {
    left: Raw,
    right: Raw,
}

fn part(job: Job, first_token: u32, row: u32, factor: f32) -> Part {
    let slot = subgroup * 16u + lane / 8u + row;
    let token = min(first_token + slot, job.first + job.count - 1u);
    let place = job.f0 / RAW_WORDS + (token - job.first) * job.width / 4u + lane % 8u;
    return Part(place, slot * OUT_STRIDE + lane % 8u, factor);
}

fn features(job: Job, part: Part, channel: u32) -> Channels {
    let left = channel + lane % 8u * 4u;
    let place = part.place + channel / 4u;
    if (channel + CHANNELS <= job.width) {
        return Channels(f0[place], f0[place + 8u]);
    }
    var all = Channels(Raw(NOWHERE), Raw(NOWHERE));
    if (left < job.width) {
        all.left = f0[place];
    }
    if (left + 32u < job.width) {
        all.right = f0[place + 8u];
    }
    return all;
}

fn left_product(part: Part) -> vec4<f32> {
    return sums[part.at] * part.factor;
}

fn right_product(part: Part) -> vec4<f32> {
    return sums[part.at + 8u] * part.factor;
}

// A block of Z·B_catᵀ for features of 16 bits, in one product of halves with f32 sums: 32 tokens × CHANNELS channels for
// each subgroup of a workgroup, all of which have the same tokens. Z becomes halves in workgroup memory, each row brought into
// f16's range and rounded; fragments of B_cat come straight from memory, in which branch/split_b.wgsl has laid them out as
// units read them. Features of 16 bits are themselves rounded to 2^-12 or 2^-9 of their size.
//
// Bindings: 3 B_cat, 4 Z. The permutation sets CHANNELS, DEPTH, the most columns that Z has in workgroup memory, and HELD,
// whether units hold all of them in registers. What multiplies is on units or in software.

@group(0) @binding(3) var<storage, read> b_halves: array<vec4<f16>>;
@group(0) @binding(4) var<storage, read> values: array<f32>;

const SUBGROUPS: u32 = 4u;
const THREADS: u32 = SUBGROUPS * 32u;
const TOKENS: u32 = 32u;

// Rows of halves and of sums, in vectors of 4. Padded, they keep loads from meeting in a bank.
const STRIDE: u32 = DEPTH / 4u + 2u;
const OUT_STRIDE: u32 = CHANNELS / 4u + 1u;
const OUT_LEN: u32 = TOKENS * OUT_STRIDE;
var<workgroup> z_halves: array<vec4<f16>, TOKENS * STRIDE>;
var<workgroup> sums: array<vec4<f32>, SUBGROUPS * OUT_LEN>;
// What undoes the powers of two of Z's rows, and B_cat's.
var<workgroup> inverses: array<f32, 2u * TOKENS>;

// The 4 threads of a row have so many vectors of it each.
const QUADS: u32 = DEPTH / 16u;

// Puts columns `first` .. `end` of Z into `z_halves`, from their column `place` on, with zeros up to `room` columns, and
// what undoes their scales from `inverse_place` on. Multiples of 16.
fn stage_z(job: Job, first: u32, end: u32, first_token: u32, place: u32, room: u32, inverse_place: u32) {
    let row = t / 4u;
    // Beyond the last token anything will do.
    let token = min(first_token + row, job.first + job.count - 1u);
    var z: array<vec4<f32>, QUADS>;
    var most = vec4<u32>(0u);
    for (var i = 0u; i < QUADS; i++) {
        let column = first + t % 4u * 4u + i * 16u;
        if (column < end) {
            let branch = branch_of(column);
            let start = jobs[0].starts[branch];
            let rank = jobs[0].starts[branch + 1u] - start;
            z[i] = quad(token * job.rank + start, 1u, column - jobs[0].column_starts[branch], rank);
            most = max(most, exponents(bitcast<vec4<u32>>(z[i])));
        }
    }
    let scale = min(scale_of_row(most, 4u), MOST_SCALE);
    for (var i = 0u; i < QUADS; i++) {
        let column = t % 4u * 4u + i * 16u;
        if (column < room) {
            z_halves[row * STRIDE + (place + column) / 4u] = vec4<f16>(z[i] * scale);
        }
    }
    if (t % 4u == 0u) {
        inverses[inverse_place + row] = inverse_of(scale) / B_SCALE;
    }
}

// The fragment of 16 channels and of 16 columns from `column` on.
fn fragment(job: Job, channel: u32, column: u32) -> u32 {
    return (channel / 16u * job.columns + column) * 4u;
}

// Z = X·A_catᵀ for X of 16 bits on matrix units, in one product of halves with f32 sums: what branch/scores_halves.wgsl and
// branch/apply_halves.wgsl start from. project_matrix.wgsl keeps f32's accuracy.
//
//   X: tokens × width, row-major, f16 or bf16; width a multiple of 8
//   A_cat: halves in fragments of 16 × 16, those of 16 channels one after the other, zero beyond width and rank
//   Z: tokens × rank, f32
//
// The subgroups of a workgroup have the same tokens and take turns in the width, DEPTH at a time; their sums meet in
// workgroup memory. Values of bf16 become halves as they are, which is exact unless the largest of a row is out of the range
// for that: then all is done once more, with each row brought into it by a power of two.
//
// Grid: (token tile, tile of COLUMNS rows of A_cat). Bindings: 3 X, 4 A_cat, 5 scales of its rows, 6 Z.
// The permutation sets DTYPE and COLUMNS, 32 or 64. `add_products` is on units or in software.

enable f16;

#import shared/words
#import shared/exponents

struct Job {
    x: u32,     // first vec4 of X
    z: u32,     // first element of Z
    tokens: u32,
    rank: u32,
    width: u32,
    columns: u32,   // of A_cat's fragments, a multiple of COLUMNS
}

@group(0) @binding(1) var<storage, read> jobs: array<Job>;
@group(0) @binding(3) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> a_halves: array<vec4<f16>>;
@group(0) @binding(5) var<storage, read> a_scales: array<f32>;
@group(0) @binding(6) var<storage, read_write> z: array<f32>;

const SUBGROUPS: u32 = 4u;
const THREADS: u32 = SUBGROUPS * 32u;
const TOKENS: u32 = 32u;
const DEPTH: u32 = 32u;

// Rows of halves and of sums, in vectors of 4. Padded, they keep loads from meeting in a bank.
const STRIDE: u32 = DEPTH / 4u + 2u;
const OUT_STRIDE: u32 = 5u;
const OUT_LEN: u32 = TOKENS * OUT_STRIDE;
var<workgroup> x_halves: array<vec4<f16>, SUBGROUPS * TOKENS * STRIDE>;
var<workgroup> sums: array<vec4<f32>, SUBGROUPS * OUT_LEN>;
var<workgroup> largest: array<atomic<u32>, TOKENS>;
// In 16 bytes, so that what follows stays on them.
var<workgroup> out_of_range: vec4<u32>;

// The fragment of 16 channels and of 16 rows of A_cat from `row` on.
fn fragment(job: Job, channel: u32, row: u32) -> u32 {
    return (channel / 16u * job.columns + row) * 4u;
}

#import products

// Exponents of rows whose values halves hold: 2^-6 to 2^15. Of zero alone there is none.
fn holds(exponent: u32) -> bool {
    let e = exponent >> 23u;
    return e == 0u || (e >= 127u - 6u && e < 127u + 15u);
}

fn halves(low: u32, high: u32, scale: f32) -> vec4<f16> {
    return vec4<f16>(vec4<f32>(unpack_halves(low, DTYPE), unpack_halves(high, DTYPE)) * scale);
}

// The lanes of a row have 8 values each, and a subgroup ROWS rows at once.
const LANES: u32 = DEPTH / 8u;
const ROWS: u32 = 32u / LANES;
const TIMES: u32 = TOKENS / ROWS;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) work: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup_id: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
) {
    locate(thread, subgroup_id, subgroup_lane);
    let job = jobs[0];
    let first_token = work.x * TOKENS;
    let first_row = work.y * COLUMNS;
    let row = lane / LANES;
    let vectors = job.width / 8u;
    let place = subgroup * TOKENS * STRIDE + row * STRIDE + lane % LANES * 2u;
    // Rows past the end repeat the last, and vectors past the width the last there, where A_cat is zero: nobody reads what
    // becomes of them.
    var rows: array<u32, TIMES>;
    for (var i = 0u; i < TIMES; i++) {
        rows[i] = job.x + min(first_token + row + i * ROWS, job.tokens - 1u) * vectors;
    }
    if (t < TOKENS) {
        atomicStore(&largest[t], 0u);
    }
    var scales: array<f32, TIMES>;
    for (var i = 0u; i < TIMES; i++) {
        scales[i] = 1.0;
    }
    for (var again = 0u; again < 2u; again++) {
        clear_sums();
        var most: array<vec4<u32>, TIMES>;
        var next: array<vec4<u32>, TIMES>;
        let first_vector = min(subgroup * LANES + lane % LANES, vectors - 1u);
        for (var i = 0u; i < TIMES; i++) {
            next[i] = x[rows[i] + first_vector];
        }
        for (var base = 0u; base < job.width; base += SUBGROUPS * DEPTH) {
            let channel = base + subgroup * DEPTH;
            for (var i = 0u; i < TIMES; i++) {
                let raw = next[i];
                x_halves[place + i * ROWS * STRIDE] = halves(raw.x, raw.y, scales[i]);
                x_halves[place + i * ROWS * STRIDE + 1u] = halves(raw.z, raw.w, scales[i]);
                if (DTYPE == BF16) {
                    most[i] = max(most[i], max(exponents(raw), exponents(raw << vec4<u32>(16u))));
                }
            }
            // What comes next is on its way while this is at work.
            let ahead = min((channel + SUBGROUPS * DEPTH) / 8u + lane % LANES, vectors - 1u);
            for (var i = 0u; i < TIMES; i++) {
                next[i] = x[rows[i] + ahead];
            }
            meet();
            // A subgroup that the width leaves nothing for adds zeros.
            add_products(job, channel, first_row);
            meet();
        }
        if (DTYPE == F16 || again == 1u) {
            break;
        }
        for (var i = 0u; i < TIMES; i++) {
            atomicMax(&largest[row + i * ROWS], largest_of(most[i]));
        }
        workgroupBarrier();
        if (t == 0u) {
            var any = false;
            for (var i = 0u; i < TOKENS; i++) {
                any = any || !holds(atomicLoad(&largest[i]));
            }
            out_of_range = vec4<u32>(u32(any));
        }
        if (workgroupUniformLoad(&out_of_range).x == 0u) {
            break;
        }
        for (var i = 0u; i < TIMES; i++) {
            scales[i] = scale_of(atomicLoad(&largest[row + i * ROWS]));
        }
    }

    // Each thread has 4 columns of a token.
    let slot = t / 4u;
    let token = first_token + slot;
    var inverse = 1.0;
    if (DTYPE == BF16 && out_of_range.x != 0u) {
        inverse = inverse_of(scale_of(atomicLoad(&largest[slot])));
    }
    for (var block = 0u; block < COLUMNS / 16u; block++) {
        put_sums(block);
        workgroupBarrier();
        let at = slot * OUT_STRIDE + t % 4u;
        var sum = sums[at];
        for (var other = 1u; other < SUBGROUPS; other++) {
            sum += sums[other * OUT_LEN + at];
        }
        for (var i = 0u; i < 4u; i++) {
            let k = first_row + block * 16u + t % 4u * 4u + i;
            if (token < job.tokens && k < job.rank) {
                z[job.z + token * job.rank + k] = sum[i] * inverse * inverse_of(a_scales[k]);
            }
        }
        workgroupBarrier();
    }
}

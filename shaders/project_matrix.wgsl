// Z = X·Aᵀ on matrix units: f16 operands and f32 sums that keep f32's accuracy. The fast twin of
// project.wgsl, for adapters with 16×16×16 f16 to f32 matrices and subgroups of 32.
//
//   X: tokens × width, row-major, f32, f16 or bf16      A: rank × width, f32      width: a multiple of 8
//
// Rows of X, but for f16, are brought into f16's range by powers of two; A comes ready from split_rows.wgsl.
// sum_parts.wgsl takes the powers out again. f16 and bf16 values are then exact in f16 (short of 2^-32 of the largest of
// their row); f32 values are split by mask into a high and a low part of 11 bits each, and the products of two low parts
// left out. Where A came from halves it has no low part, which halves the work. The unit's accumulator truncates, so it
// sums only DEPTH products before they are added in f32. Where FAST is set, X of f32 is rounded to 11 bits, and the unit
// sums all products with an A without low parts.
//
// The power of a row is guessed from its first DEPTH values, with room for others 2^7 times as large. While X passes, each
// workgroup sees whether that was enough; if not, it begins anew with what it knows then. So X is read once, but for rows
// that surprise.
//
// Work: (job, token tile, rank tile, part). A workgroup makes one TILE_M × TILE_N tile of one part of the width and
// leaves it, scaled as it is, in `parts`: for each part of the width a matrix of whole tiles, `stride` columns wide. The
// scales of X stand there too: a column for each part. X passes through workgroup memory, where one step is multiplied
// while the next is stored and the one after fetched; matrices of A, which lie as the units want them, come straight
// from memory.
// Bindings: 3 X as raw words, 4 high and 5 low parts of A, 6 parts, 7 scales of rows of A.
// The permutation sets FAST, DTYPE and TILE_N, 32, 64 or 128. A subgroup has all tokens of the tile and 16 columns.

enable f16;
enable wgpu_cooperative_matrix;

#import shared/params
#import shared/words
#import shared/halves
#import shared/row_lanes

struct Job {
    x: u32,     // first word, a multiple of 4
    a: u32,     // first element of high and of low, a multiple of 256
    z: u32,     // first element in parts
    tokens: u32,
    rank: u32,
    width: u32,
    stride: u32,
    part_width: u32,    // a multiple of DEPTH
    a_width: u32,   // the width that high and low have, a multiple of DEPTH
    a_columns: u32, // matrices of 16 columns that lie side by side in high and low
    x_scales: u32,  // first element in parts; of f16 none
    a_scales: u32,  // first element
}

@group(0) @binding(3) var<storage, read> x_words: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> a_high: array<vec4<f16>>;
@group(0) @binding(5) var<storage, read> a_low: array<vec4<f16>>;
@group(0) @binding(6) var<storage, read_write> parts: array<f32>;
@group(0) @binding(7) var<storage, read> scales: array<f32>;

const TILE_M: u32 = 64u;
const THREADS: u32 = TILE_N * 2u;
const DEPTH: u32 = 32u;
// A row of a tile, in vectors of 4. Padded rows keep the loads of a matrix from meeting in a bank, and stay on 16 bytes.
const STRIDE: u32 = DEPTH / 4u + 2u;
// 16 rows of a tile, and the vectors of a matrix of A.
const SIXTEEN_ROWS: u32 = 16u * STRIDE;
const MATRIX: u32 = 64u;

// Values of X in 16 bytes, the threads of a row, and how a tile of it is shared: each thread fetches X_LOADS times, X_STEP
// rows apart.
const X_VALUES: u32 = select(8u, 4u, DTYPE == F32);
const X_LANES: u32 = DEPTH / X_VALUES;
const X_STEP: u32 = THREADS / X_LANES;
const X_LOADS: u32 = TILE_M / X_STEP;

// How far below scale_of_row a guess stays, and the exponents that a value may be above those it was guessed from.
const ROOM: f32 = 0.015625;
const MOST_ABOVE: u32 = 7u << 23u;

// Only f32 has low parts.
const X_HAS_LOW: bool = DTYPE == F32 && !FAST;

// Two steps, each a tile of high parts and, where X has them, one of low parts; in one array, so that all lie on 16 bytes, which
// loads of matrices need.
const TILE_LEN: u32 = TILE_M * STRIDE;
const STEP_LEN: u32 = TILE_LEN * select(1u, 2u, X_HAS_LOW);
var<workgroup> tile: array<vec4<f16>, 2u * STEP_LEN>;

// Answers that all threads agree on: they go through memory, for naga to see it, and take 16 bytes, so that the tile stays
// on them. x: any row of this tile of A has low parts, y: a guess was wrong, for which any thread votes.
var<workgroup> agreed: vec4<u32>;
var<workgroup> votes: array<atomic<u32>, 4>;

fn halves(low: u32, high: u32, scale: f32) -> vec4<f16> {
    return vec4<f16>(vec4<f32>(unpack_halves(low, DTYPE), unpack_halves(high, DTYPE)) * scale);
}

// Stores 16 bytes of X in halves.
fn put_x(at: u32, raw: vec4<u32>, scale: f32) {
    if (DTYPE == F32 && FAST) {
        tile[at] = vec4<f16>(bitcast<vec4<f32>>(raw) * scale);
    } else if (DTYPE == F32) {
        let parts = split(bitcast<vec4<f32>>(raw) * scale);
        tile[at] = parts.high;
        tile[at + TILE_LEN] = parts.low;
    } else {
        tile[at] = halves(raw.x, raw.y, scale);
        tile[at + 1u] = halves(raw.z, raw.w, scale);
    }
}

fn largest(raw: vec4<u32>) -> vec4<u32> {
    if (DTYPE == F32) {
        return exponents(raw);
    }
    return max(exponents(raw), exponents(raw << vec4<u32>(16u)));
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    // What shares a row must share a subgroup.
    let t = subgroup * 32u + lane;
    // Matrix operations allow no early return: workgroups past the end repeat the last one's work.
    let work = work_table[min(work_index(workgroup), arrayLength(&work_table) - 1u)];
    let job = jobs[work.x];
    let first_row = work.y * TILE_M;
    let first_column = work.z * TILE_N + subgroup * 16u;
    let start = work.w * job.part_width;
    let end = min(start + job.part_width, job.a_width);
    let last = end - DEPTH;

    // Rows past the end repeat the last, and vectors past the width the last there, where A is zero: nobody reads what
    // becomes of them.
    let x_row = t / X_LANES;
    let x_vector = t % X_LANES;
    let x_vectors = job.width / X_VALUES;
    let x_place = x_row * STRIDE + x_vector * (X_VALUES / 4u);
    var x_at: array<u32, X_LOADS>;
    for (var i = 0u; i < X_LOADS; i++) {
        x_at[i] = job.x / 4u + min(first_row + x_row + i * X_STEP, job.tokens - 1u) * x_vectors;
    }

    // Every subgroup finds the same.
    var low_row = false;
    for (var c = lane; c < TILE_N; c += 32u) {
        low_row = low_row || scales[job.a_scales + min(work.z * TILE_N + c, job.rank - 1u)] < 0.0;
    }
    let any_low = subgroupAny(low_row);
    if (t == 0u) {
        agreed = vec4<u32>(u32(any_low), 0u, 0u, 0u);
        atomicStore(&votes[0], 0u);
    }
    let has_low = workgroupUniformLoad(&agreed).x != 0u;

    var x: array<vec4<u32>, X_LOADS>;
    var guessed: array<u32, X_LOADS>;
    var x_scales: array<f32, X_LOADS>;
    let v0 = min(start / X_VALUES + x_vector, x_vectors - 1u);
    let v1 = min(min(start + DEPTH, last) / X_VALUES + x_vector, x_vectors - 1u);
    for (var i = 0u; i < X_LOADS; i++) {
        x[i] = x_words[x_at[i] + v0];
        x_scales[i] = 1.0;
        if (DTYPE != F16) {
            guessed[i] = largest_of_row(largest(x[i]), X_LANES);
            x_scales[i] = scale_of(guessed[i]) * ROOM;
        }
    }

    for (var attempt = 0u; attempt < 2u; attempt++) {
        var most: array<vec4<u32>, X_LOADS>;
        for (var i = 0u; i < X_LOADS; i++) {
            most[i] = largest(x[i]);
            put_x(x_place + i * X_STEP * STRIDE, x[i], x_scales[i]);
            x[i] = x_words[x_at[i] + v1];
        }
        workgroupBarrier();

        var c0: coop_mat16x16<f32, C>;
        var c1: coop_mat16x16<f32, C>;
        var c2: coop_mat16x16<f32, C>;
        var c3: coop_mat16x16<f32, C>;
        var here = 0u;
        // A branch within one loop would make it a quarter slower, and what both share as functions a tenth.
        let stride = STRIDE;
        let a_stride = 4u;
        if (has_low) {
            for (var k = start; k < end; k += DEPTH) {
                let next = STEP_LEN - here;
                let ahead = min(min(k + 2u * DEPTH, last) / X_VALUES + x_vector, x_vectors - 1u);
                for (var i = 0u; i < X_LOADS; i++) {
                    most[i] = max(most[i], largest(x[i]));
                    put_x(next + x_place + i * X_STEP * STRIDE, x[i], x_scales[i]);
                }
                // What is fetched here is looked at a step later: whoever looks, waits.
                for (var i = 0u; i < X_LOADS; i++) {
                    x[i] = x_words[x_at[i] + ahead];
                }
                // Matrix rows 0 to 3 of X, in the first (a) and second half (b) of the depth.
                let at0a = here;
                let at1a = at0a + SIXTEEN_ROWS;
                let at2a = at1a + SIXTEEN_ROWS;
                let at3a = at2a + SIXTEEN_ROWS;
                let at0b = at0a + 4u;
                let at1b = at1a + 4u;
                let at2b = at2a + 4u;
                let at3b = at3a + 4u;
                let x0a = coopLoadT<coop_mat16x16<f16, A>>(&tile[at0a], stride);
                let x1a = coopLoadT<coop_mat16x16<f16, A>>(&tile[at1a], stride);
                let x2a = coopLoadT<coop_mat16x16<f16, A>>(&tile[at2a], stride);
                let x3a = coopLoadT<coop_mat16x16<f16, A>>(&tile[at3a], stride);
                let x0b = coopLoadT<coop_mat16x16<f16, A>>(&tile[at0b], stride);
                let x1b = coopLoadT<coop_mat16x16<f16, A>>(&tile[at1b], stride);
                let x2b = coopLoadT<coop_mat16x16<f16, A>>(&tile[at2b], stride);
                let x3b = coopLoadT<coop_mat16x16<f16, A>>(&tile[at3b], stride);
                let a_at = job.a / 4u + (k / 16u * job.a_columns + first_column / 16u) * MATRIX;
                let b_at = a_at + job.a_columns * MATRIX;
                let high_a = coopLoad<coop_mat16x16<f16, B>>(&a_high[a_at], a_stride);
                let high_b = coopLoad<coop_mat16x16<f16, B>>(&a_high[b_at], a_stride);
                var s0: coop_mat16x16<f32, C>;
                var s1: coop_mat16x16<f32, C>;
                var s2: coop_mat16x16<f32, C>;
                var s3: coop_mat16x16<f32, C>;
                // Small terms come first.
                let low_a = coopLoad<coop_mat16x16<f16, B>>(&a_low[a_at], a_stride);
                let low_b = coopLoad<coop_mat16x16<f16, B>>(&a_low[b_at], a_stride);
                s0 = coopMultiplyAdd(x0a, low_a, s0);
                s1 = coopMultiplyAdd(x1a, low_a, s1);
                s2 = coopMultiplyAdd(x2a, low_a, s2);
                s3 = coopMultiplyAdd(x3a, low_a, s3);
                s0 = coopMultiplyAdd(x0b, low_b, s0);
                s1 = coopMultiplyAdd(x1b, low_b, s1);
                s2 = coopMultiplyAdd(x2b, low_b, s2);
                s3 = coopMultiplyAdd(x3b, low_b, s3);
                if (X_HAS_LOW) {
                    let low_at0a = at0a + TILE_LEN;
                    let low_at1a = at1a + TILE_LEN;
                    let low_at2a = at2a + TILE_LEN;
                    let low_at3a = at3a + TILE_LEN;
                    let low_at0b = at0b + TILE_LEN;
                    let low_at1b = at1b + TILE_LEN;
                    let low_at2b = at2b + TILE_LEN;
                    let low_at3b = at3b + TILE_LEN;
                    let low0a = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at0a], stride);
                    let low1a = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at1a], stride);
                    let low2a = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at2a], stride);
                    let low3a = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at3a], stride);
                    let low0b = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at0b], stride);
                    let low1b = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at1b], stride);
                    let low2b = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at2b], stride);
                    let low3b = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at3b], stride);
                    s0 = coopMultiplyAdd(low0a, high_a, s0);
                    s1 = coopMultiplyAdd(low1a, high_a, s1);
                    s2 = coopMultiplyAdd(low2a, high_a, s2);
                    s3 = coopMultiplyAdd(low3a, high_a, s3);
                    s0 = coopMultiplyAdd(low0b, high_b, s0);
                    s1 = coopMultiplyAdd(low1b, high_b, s1);
                    s2 = coopMultiplyAdd(low2b, high_b, s2);
                    s3 = coopMultiplyAdd(low3b, high_b, s3);
                }
                s0 = coopMultiplyAdd(x0a, high_a, s0);
                s1 = coopMultiplyAdd(x1a, high_a, s1);
                s2 = coopMultiplyAdd(x2a, high_a, s2);
                s3 = coopMultiplyAdd(x3a, high_a, s3);
                s0 = coopMultiplyAdd(x0b, high_b, s0);
                s1 = coopMultiplyAdd(x1b, high_b, s1);
                s2 = coopMultiplyAdd(x2b, high_b, s2);
                s3 = coopMultiplyAdd(x3b, high_b, s3);
                c0 = c0 + s0;
                c1 = c1 + s1;
                c2 = c2 + s2;
                c3 = c3 + s3;
                here = next;
                workgroupBarrier();
            }
        } else {
            for (var k = start; k < end; k += DEPTH) {
                let next = STEP_LEN - here;
                let ahead = min(min(k + 2u * DEPTH, last) / X_VALUES + x_vector, x_vectors - 1u);
                for (var i = 0u; i < X_LOADS; i++) {
                    most[i] = max(most[i], largest(x[i]));
                    put_x(next + x_place + i * X_STEP * STRIDE, x[i], x_scales[i]);
                }
                // What is fetched here is looked at a step later: whoever looks, waits.
                for (var i = 0u; i < X_LOADS; i++) {
                    x[i] = x_words[x_at[i] + ahead];
                }
                // Matrix rows 0 to 3 of X, in the first (a) and second half (b) of the depth.
                let at0a = here;
                let at1a = at0a + SIXTEEN_ROWS;
                let at2a = at1a + SIXTEEN_ROWS;
                let at3a = at2a + SIXTEEN_ROWS;
                let at0b = at0a + 4u;
                let at1b = at1a + 4u;
                let at2b = at2a + 4u;
                let at3b = at3a + 4u;
                let x0a = coopLoadT<coop_mat16x16<f16, A>>(&tile[at0a], stride);
                let x1a = coopLoadT<coop_mat16x16<f16, A>>(&tile[at1a], stride);
                let x2a = coopLoadT<coop_mat16x16<f16, A>>(&tile[at2a], stride);
                let x3a = coopLoadT<coop_mat16x16<f16, A>>(&tile[at3a], stride);
                let x0b = coopLoadT<coop_mat16x16<f16, A>>(&tile[at0b], stride);
                let x1b = coopLoadT<coop_mat16x16<f16, A>>(&tile[at1b], stride);
                let x2b = coopLoadT<coop_mat16x16<f16, A>>(&tile[at2b], stride);
                let x3b = coopLoadT<coop_mat16x16<f16, A>>(&tile[at3b], stride);
                let a_at = job.a / 4u + (k / 16u * job.a_columns + first_column / 16u) * MATRIX;
                let b_at = a_at + job.a_columns * MATRIX;
                let high_a = coopLoad<coop_mat16x16<f16, B>>(&a_high[a_at], a_stride);
                let high_b = coopLoad<coop_mat16x16<f16, B>>(&a_high[b_at], a_stride);
                if (FAST) {
                    c0 = coopMultiplyAdd(x0a, high_a, c0);
                    c1 = coopMultiplyAdd(x1a, high_a, c1);
                    c2 = coopMultiplyAdd(x2a, high_a, c2);
                    c3 = coopMultiplyAdd(x3a, high_a, c3);
                    c0 = coopMultiplyAdd(x0b, high_b, c0);
                    c1 = coopMultiplyAdd(x1b, high_b, c1);
                    c2 = coopMultiplyAdd(x2b, high_b, c2);
                    c3 = coopMultiplyAdd(x3b, high_b, c3);
                } else {
                    var s0: coop_mat16x16<f32, C>;
                    var s1: coop_mat16x16<f32, C>;
                    var s2: coop_mat16x16<f32, C>;
                    var s3: coop_mat16x16<f32, C>;
                    if (X_HAS_LOW) {
                        let low_at0a = at0a + TILE_LEN;
                        let low_at1a = at1a + TILE_LEN;
                        let low_at2a = at2a + TILE_LEN;
                        let low_at3a = at3a + TILE_LEN;
                        let low_at0b = at0b + TILE_LEN;
                        let low_at1b = at1b + TILE_LEN;
                        let low_at2b = at2b + TILE_LEN;
                        let low_at3b = at3b + TILE_LEN;
                        let low0a = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at0a], stride);
                        let low1a = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at1a], stride);
                        let low2a = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at2a], stride);
                        let low3a = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at3a], stride);
                        let low0b = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at0b], stride);
                        let low1b = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at1b], stride);
                        let low2b = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at2b], stride);
                        let low3b = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at3b], stride);
                        s0 = coopMultiplyAdd(low0a, high_a, s0);
                        s1 = coopMultiplyAdd(low1a, high_a, s1);
                        s2 = coopMultiplyAdd(low2a, high_a, s2);
                        s3 = coopMultiplyAdd(low3a, high_a, s3);
                        s0 = coopMultiplyAdd(low0b, high_b, s0);
                        s1 = coopMultiplyAdd(low1b, high_b, s1);
                        s2 = coopMultiplyAdd(low2b, high_b, s2);
                        s3 = coopMultiplyAdd(low3b, high_b, s3);
                    }
                    s0 = coopMultiplyAdd(x0a, high_a, s0);
                    s1 = coopMultiplyAdd(x1a, high_a, s1);
                    s2 = coopMultiplyAdd(x2a, high_a, s2);
                    s3 = coopMultiplyAdd(x3a, high_a, s3);
                    s0 = coopMultiplyAdd(x0b, high_b, s0);
                    s1 = coopMultiplyAdd(x1b, high_b, s1);
                    s2 = coopMultiplyAdd(x2b, high_b, s2);
                    s3 = coopMultiplyAdd(x3b, high_b, s3);
                    c0 = c0 + s0;
                    c1 = c1 + s1;
                    c2 = c2 + s2;
                    c3 = c3 + s3;
                }
                here = next;
                workgroupBarrier();
            }
        }

        var surprised = false;
        if (DTYPE != F16) {
            for (var i = 0u; i < X_LOADS; i++) {
                surprised = surprised || largest_of(most[i]) > guessed[i] + MOST_ABOVE;
            }
        }
        if (surprised) {
            atomicStore(&votes[0], 1u);
        }
        workgroupBarrier();
        if (t == 0u) {
            agreed.y = atomicLoad(&votes[0]);
        }
        if (workgroupUniformLoad(&agreed).y == 0u || attempt == 1u) {
            let out_stride = job.stride;
            let rows = (job.tokens + TILE_M - 1u) / TILE_M * TILE_M;
            let out0 = job.z + (work.w * rows + first_row) * out_stride + first_column;
            let out1 = out0 + 16u * out_stride;
            let out2 = out1 + 16u * out_stride;
            let out3 = out2 + 16u * out_stride;
            coopStoreT(c0, &parts[out0], out_stride);
            coopStoreT(c1, &parts[out1], out_stride);
            coopStoreT(c2, &parts[out2], out_stride);
            coopStoreT(c3, &parts[out3], out_stride);
            break;
        }
        for (var i = 0u; i < X_LOADS; i++) {
            x_scales[i] = scale_of(largest_of_row(most[i], X_LANES));
            x[i] = x_words[x_at[i] + v0];
        }
    }
    if (DTYPE != F16) {
        for (var i = 0u; i < X_LOADS; i++) {
            let row = first_row + x_row + i * X_STEP;
            if (x_vector == 0u && work.z == 0u && row < job.tokens) {
                parts[job.x_scales + work.w * job.tokens + row] = x_scales[i];
            }
        }
    }
}

// Z = X·Aᵀ on matrix units: f16 operands and f32 sums that keep f32's accuracy. The fast twin of
// project.wgsl, for adapters with 16×16×16 f16 to f32 matrices and subgroups of 32.
//
//   X: tokens × width, row-major, f32, f16 or bf16      A: rank × width, f32      width: a multiple of 8
//
// Rows of X, but for f16, are brought into f16's range by the powers of two of row_scale.wgsl; A comes ready from
// split_rows.wgsl, in whole tiles. sum_parts.wgsl takes the powers out again.
// f16 and bf16 values are then exact in f16 (short of 2^-38 of the largest of their row); f32 values are split
// by mask into a high and a low part of 11 bits each, and the products of two low parts left out. Where A came
// from halves it has no low part, which halves the work. The unit's accumulator truncates, so it sums only
// DEPTH products before they are added in f32.
//
// Work: (job, token tile, rank tile, part). A workgroup makes one TILE_M × TILE_N tile of one part of the width and
// leaves it, scaled as it is, in `parts`: for each part of the width a matrix of whole tiles, `stride` columns wide.
// Bindings: 3 X as raw words, 4 high and 5 low parts of A, 6 parts, 7 scales of rows of X and A.
// The permutation sets DTYPE and TILE_N, 32 or 64. A subgroup has 32 × 32 of the tile.

#import params
#import words

struct Job {
    x: u32,     // first word, a multiple of 4
    a: u32,     // first element of high and of low, a multiple of 4
    parts: u32, // first element
    tokens: u32,
    rank: u32,
    width: u32,
    stride: u32,
    part_width: u32,    // a multiple of DEPTH
    a_stride: u32,  // elements of a row of high and of low, a multiple of DEPTH
    x_scales: u32,  // first element; of f16 none
    a_scales: u32,  // first element
}

@group(0) @binding(3) var<storage, read> x_words: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> a_high: array<vec4<f16>>;
@group(0) @binding(5) var<storage, read> a_low: array<vec4<f16>>;
@group(0) @binding(6) var<storage, read_write> parts: array<f32>;
@group(0) @binding(7) var<storage, read> scales: array<f32>;

const TILE_M: u32 = 128u;
const SUBGROUPS_N: u32 = TILE_N / 32u;
const THREADS: u32 = TILE_M * SUBGROUPS_N;
const DEPTH: u32 = 32u;
// In vectors of 4. Padded rows keep the loads of a matrix from meeting in a bank, and stay on 16 bytes.
const STRIDE: u32 = DEPTH / 4u + 2u;

// Values of X in 16 bytes, and how a tile of it is shared: each thread fetches X_LOADS times, X_STEP rows apart.
const X_VALUES: u32 = select(8u, 4u, DTYPE == F32);
const X_STEP: u32 = THREADS * X_VALUES / DEPTH;
const X_LOADS: u32 = TILE_M / X_STEP;
// Of A each thread fetches twice.
const A_STEP: u32 = TILE_N / 2u;

// One array, so that every part of it lies on 16 bytes, which loads of matrices need.
const X_HIGH: u32 = 0u;
const A_HIGH: u32 = X_HIGH + TILE_M * STRIDE;
const A_LOW: u32 = A_HIGH + TILE_N * STRIDE;
const X_LOW: u32 = A_LOW + TILE_N * STRIDE;
const TILE_LEN: u32 = X_LOW + select(0u, TILE_M * STRIDE, DTYPE == F32);
var<workgroup> tile: array<vec4<f16>, TILE_LEN>;

// Whether any row of this tile of A has low parts: through memory, for naga to see that all threads agree. 16 bytes, so
// that the tile stays on them.
var<workgroup> low_rows: vec4<u32>;

// The upper 11 bits of the mantissa, which f16 holds. By mask: f32(f16(v)) is folded away.
fn high_part(value: vec4<f32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(bitcast<vec4<u32>>(value) & vec4<u32>(0xffffe000u));
}

fn halves(low: u32, high: u32, scale: f32) -> vec4<f16> {
    return vec4<f16>(vec4<f32>(unpack_halves(low, DTYPE), unpack_halves(high, DTYPE)) * scale);
}

fn put_x(place: u32, raw: vec4<u32>, scale: f32) {
    if (DTYPE == F32) {
        let value = bitcast<vec4<f32>>(raw) * scale;
        let high = high_part(value);
        tile[X_HIGH + place] = vec4<f16>(high);
        tile[X_LOW + place] = vec4<f16>(value - high);
    } else {
        tile[X_HIGH + place] = halves(raw.x, raw.y, scale);
        tile[X_HIGH + place + 1u] = halves(raw.z, raw.w, scale);
    }
}

fn x_scale(job: Job, row: u32) -> f32 {
    if (DTYPE == F16) {
        return 1.0;
    }
    return scales[job.x_scales + row];
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    // Matrix operations allow no early return: workgroups past the end repeat the last one's work.
    let work = work_table[min(work_index(workgroup), arrayLength(&work_table) - 1u)];
    let job = jobs[work.x];
    let first_row = work.y * TILE_M;
    let first_column = work.z * TILE_N;
    let start = work.w * job.part_width;
    let end = min(start + job.part_width, job.a_stride);

    // Rows past the end repeat the last: nobody reads what becomes of them.
    const X_QUADS = DEPTH / X_VALUES;
    let x_slot = t / X_QUADS;
    let x_k = t % X_QUADS * X_VALUES;
    let x_place = x_slot * STRIDE + x_k / 4u;
    let last_row = job.tokens - 1u;
    let x_row0 = min(first_row + x_slot, last_row);
    let x_row1 = min(first_row + x_slot + X_STEP, last_row);
    let x_row2 = min(first_row + x_slot + X_STEP * 2u, last_row);
    let x_row3 = min(first_row + x_slot + X_STEP * 3u, last_row);
    let x_row4 = min(first_row + x_slot + X_STEP * 4u, last_row);
    let x_row5 = min(first_row + x_slot + X_STEP * 5u, last_row);
    let x_row6 = min(first_row + x_slot + X_STEP * 6u, last_row);
    let x_row7 = min(first_row + x_slot + X_STEP * 7u, last_row);
    const A_QUADS = DEPTH / 4u;
    let a_slot = t / A_QUADS;
    let a_k = t % A_QUADS * 4u;
    let a_place = a_slot * STRIDE + a_k / 4u;
    let a_at0 = (job.a + (first_column + a_slot) * job.a_stride + a_k) / 4u;
    let a_at1 = a_at0 + A_STEP * job.a_stride / 4u;

    let x_scale0 = x_scale(job, x_row0);
    let x_scale1 = x_scale(job, x_row1);
    let x_scale2 = x_scale(job, x_row2);
    let x_scale3 = x_scale(job, x_row3);
    let x_scale4 = x_scale(job, x_row4);
    let x_scale5 = x_scale(job, x_row5);
    let x_scale6 = x_scale(job, x_row6);
    let x_scale7 = x_scale(job, x_row7);
    let x_vectors = job.width / X_VALUES;
    let x_at0 = job.x / 4u + x_row0 * x_vectors;
    let x_at1 = job.x / 4u + x_row1 * x_vectors;
    let x_at2 = job.x / 4u + x_row2 * x_vectors;
    let x_at3 = job.x / 4u + x_row3 * x_vectors;
    let x_at4 = job.x / 4u + x_row4 * x_vectors;
    let x_at5 = job.x / 4u + x_row5 * x_vectors;
    let x_at6 = job.x / 4u + x_row6 * x_vectors;
    let x_at7 = job.x / 4u + x_row7 * x_vectors;
    // Every subgroup finds the same.
    var low = false;
    for (var c = lane; c < TILE_N; c += 32u) {
        low = low || scales[job.a_scales + min(first_column + c, job.rank - 1u)] < 0.0;
    }
    let any_low = subgroupAny(low);
    if (t == 0u) {
        low_rows = vec4<u32>(u32(any_low));
    }
    let has_low = workgroupUniformLoad(&low_rows).x != 0u;

    let tile_row = subgroup / SUBGROUPS_N * 32u;
    let tile_column = subgroup % SUBGROUPS_N * 32u;
    let out_row = first_row + tile_row;
    let rows = (job.tokens + TILE_M - 1u) / TILE_M * TILE_M;
    let out = job.parts + (work.w * rows + out_row) * job.stride + first_column + tile_column;

    var c00: coop_mat16x16<f32, C>;
    var c10: coop_mat16x16<f32, C>;
    var c01: coop_mat16x16<f32, C>;
    var c11: coop_mat16x16<f32, C>;
    for (var k = start; k < end; k += DEPTH) {
        // Past the width anything will do, as A is zero there.
        let x_vector = min((k + x_k) / X_VALUES, x_vectors - 1u);
        let x0 = x_words[x_at0 + x_vector];
        let x1 = x_words[x_at1 + x_vector];
        var x2: vec4<u32>;
        var x3: vec4<u32>;
        var x4: vec4<u32>;
        var x5: vec4<u32>;
        var x6: vec4<u32>;
        var x7: vec4<u32>;
        if (X_LOADS > 2u) {
            x2 = x_words[x_at2 + x_vector];
            x3 = x_words[x_at3 + x_vector];
        }
        if (X_LOADS > 4u) {
            x4 = x_words[x_at4 + x_vector];
            x5 = x_words[x_at5 + x_vector];
            x6 = x_words[x_at6 + x_vector];
            x7 = x_words[x_at7 + x_vector];
        }
        let high0 = a_high[a_at0 + k / 4u];
        let high1 = a_high[a_at1 + k / 4u];
        var low0: vec4<f16>;
        var low1: vec4<f16>;
        if (has_low) {
            low0 = a_low[a_at0 + k / 4u];
            low1 = a_low[a_at1 + k / 4u];
        }
        workgroupBarrier();
        put_x(x_place, x0, x_scale0);
        put_x(x_place + X_STEP * STRIDE, x1, x_scale1);
        if (X_LOADS > 2u) {
            put_x(x_place + X_STEP * 2u * STRIDE, x2, x_scale2);
            put_x(x_place + X_STEP * 3u * STRIDE, x3, x_scale3);
        }
        if (X_LOADS > 4u) {
            put_x(x_place + X_STEP * 4u * STRIDE, x4, x_scale4);
            put_x(x_place + X_STEP * 5u * STRIDE, x5, x_scale5);
            put_x(x_place + X_STEP * 6u * STRIDE, x6, x_scale6);
            put_x(x_place + X_STEP * 7u * STRIDE, x7, x_scale7);
        }
        tile[A_HIGH + a_place] = high0;
        tile[A_HIGH + a_place + A_STEP * STRIDE] = high1;
        if (has_low) {
            tile[A_LOW + a_place] = low0;
            tile[A_LOW + a_place + A_STEP * STRIDE] = low1;
        }
        workgroupBarrier();
        let stride = STRIDE;
        let tile_at0 = X_HIGH + tile_row * STRIDE;
        let tile_at1 = tile_at0 + 16u * STRIDE;
        // Matrix rows 0 and 1 of X, in the first and second half of the depth.
        let tile_at0b = tile_at0 + 4u;
        let tile_at1b = tile_at1 + 4u;
        let x0a = coopLoadT<coop_mat16x16<f16, A>>(&tile[tile_at0], stride);
        let x0b = coopLoadT<coop_mat16x16<f16, A>>(&tile[tile_at0b], stride);
        let x1a = coopLoadT<coop_mat16x16<f16, A>>(&tile[tile_at1], stride);
        let x1b = coopLoadT<coop_mat16x16<f16, A>>(&tile[tile_at1b], stride);
        var x0a_low: coop_mat16x16<f16, A>;
        var x0b_low: coop_mat16x16<f16, A>;
        var x1a_low: coop_mat16x16<f16, A>;
        var x1b_low: coop_mat16x16<f16, A>;
        if (DTYPE == F32) {
            let low_at0 = tile_at0 - X_HIGH + X_LOW;
            let low_at1 = tile_at1 - X_HIGH + X_LOW;
            let low_at0b = low_at0 + 4u;
            let low_at1b = low_at1 + 4u;
            x0a_low = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at0], stride);
            x0b_low = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at0b], stride);
            x1a_low = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at1], stride);
            x1b_low = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at1b], stride);
        }
        // Column by column of matrices; small terms first.
        let column_at0 = tile_column * STRIDE;
        let high_at0a = A_HIGH + column_at0;
        let high_at0b = high_at0a + 4u;
        let high0a = coopLoad<coop_mat16x16<f16, B>>(&tile[high_at0a], stride);
        let high0b = coopLoad<coop_mat16x16<f16, B>>(&tile[high_at0b], stride);
        var s00: coop_mat16x16<f32, C>;
        var s10: coop_mat16x16<f32, C>;
        if (has_low) {
            let low_at0a = A_LOW + column_at0;
            let low_at0b = low_at0a + 4u;
            let low0a = coopLoad<coop_mat16x16<f16, B>>(&tile[low_at0a], stride);
            let low0b = coopLoad<coop_mat16x16<f16, B>>(&tile[low_at0b], stride);
            s00 = coopMultiplyAdd(x0a, low0a, s00);
            s10 = coopMultiplyAdd(x1a, low0a, s10);
            s00 = coopMultiplyAdd(x0b, low0b, s00);
            s10 = coopMultiplyAdd(x1b, low0b, s10);
        }
        if (DTYPE == F32) {
            s00 = coopMultiplyAdd(x0a_low, high0a, s00);
            s10 = coopMultiplyAdd(x1a_low, high0a, s10);
            s00 = coopMultiplyAdd(x0b_low, high0b, s00);
            s10 = coopMultiplyAdd(x1b_low, high0b, s10);
        }
        s00 = coopMultiplyAdd(x0a, high0a, s00);
        s10 = coopMultiplyAdd(x1a, high0a, s10);
        s00 = coopMultiplyAdd(x0b, high0b, s00);
        s10 = coopMultiplyAdd(x1b, high0b, s10);
        c00 = c00 + s00;
        c10 = c10 + s10;
        let column_at1 = (tile_column + 16u) * STRIDE;
        let high_at1a = A_HIGH + column_at1;
        let high_at1b = high_at1a + 4u;
        let high1a = coopLoad<coop_mat16x16<f16, B>>(&tile[high_at1a], stride);
        let high1b = coopLoad<coop_mat16x16<f16, B>>(&tile[high_at1b], stride);
        var s01: coop_mat16x16<f32, C>;
        var s11: coop_mat16x16<f32, C>;
        if (has_low) {
            let low_at1a = A_LOW + column_at1;
            let low_at1b = low_at1a + 4u;
            let low1a = coopLoad<coop_mat16x16<f16, B>>(&tile[low_at1a], stride);
            let low1b = coopLoad<coop_mat16x16<f16, B>>(&tile[low_at1b], stride);
            s01 = coopMultiplyAdd(x0a, low1a, s01);
            s11 = coopMultiplyAdd(x1a, low1a, s11);
            s01 = coopMultiplyAdd(x0b, low1b, s01);
            s11 = coopMultiplyAdd(x1b, low1b, s11);
        }
        if (DTYPE == F32) {
            s01 = coopMultiplyAdd(x0a_low, high1a, s01);
            s11 = coopMultiplyAdd(x1a_low, high1a, s11);
            s01 = coopMultiplyAdd(x0b_low, high1b, s01);
            s11 = coopMultiplyAdd(x1b_low, high1b, s11);
        }
        s01 = coopMultiplyAdd(x0a, high1a, s01);
        s11 = coopMultiplyAdd(x1a, high1a, s11);
        s01 = coopMultiplyAdd(x0b, high1b, s01);
        s11 = coopMultiplyAdd(x1b, high1b, s11);
        c01 = c01 + s01;
        c11 = c11 + s11;
    }
    let stride = job.stride;
    let out01 = out + 16u;
    let out10 = out + 16u * stride;
    let out11 = out10 + 16u;
    coopStoreT(c00, &parts[out], stride);
    coopStoreT(c01, &parts[out01], stride);
    coopStoreT(c10, &parts[out10], stride);
    coopStoreT(c11, &parts[out11], stride);
}

// Z = X·Aᵀ on matrix units: f16 operands and f32 sums that keep f32's accuracy. The fast twin of
// project.wgsl, for adapters with 16×16×16 f16 to f32 matrices and subgroups of 32.
//
//   X: tokens × width, row-major, f32, f16 or bf16      A: rank × width, f32      width: a multiple of 8
//
// Rows are brought into f16's range by the powers of two of row_scale.wgsl, which sum_parts.wgsl takes out again.
// f16 and bf16 values are then exact in f16 (short of 2^-38 of the largest of their row); f32 values are split
// by mask into a high and a low part of 11 bits each, and the products of two low parts left out. Where A came
// from halves it has no low part, which halves the work. The unit's accumulator truncates, so it sums at most
// CHUNK products before they are added in f32.
//
// Work: (job, token tile, rank tile, part). A workgroup makes one TILE_M × TILE_N tile of one part of the width and
// leaves it, scaled as it is, in `parts`: for each part of the width a matrix of whole tiles, `stride` columns wide.
// Bindings: 3 X as raw words, 4 A, 5 parts, 6 scales of rows of X and A.
// The permutation sets DTYPE, and SUBGROUPS_M, SUBGROUPS_N and FRAGMENTS_N: a subgroup has 32 × 16 · FRAGMENTS_N
// of the tile.

#import params
#import words

struct Job {
    x: u32,     // first word, a multiple of 4
    a: u32,     // first element, a multiple of 4
    parts: u32, // first element
    tokens: u32,
    rank: u32,
    width: u32,
    stride: u32,
    part_width: u32,    // a multiple of DEPTH
    x_scales: u32,  // first element
    a_scales: u32,  // first element
}

@group(0) @binding(3) var<storage, read> x_words: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> parts: array<f32>;
@group(0) @binding(6) var<storage, read> scales: array<f32>;

const TILE_M: u32 = SUBGROUPS_M * 32u;
const TILE_N: u32 = SUBGROUPS_N * FRAGMENTS_N * 16u;
const THREADS: u32 = SUBGROUPS_M * SUBGROUPS_N * 32u;
const DEPTH: u32 = 32u;
const CHUNK: u32 = 384u;
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

// Whether any row of this tile of A has low parts.
var<workgroup> low_rows: u32;
// Whether there was a chunk before. Through memory, as is the above, for naga to see that all threads agree.
var<workgroup> continues: u32;

fn x_scale(job: Job, row: u32) -> f32 {
    if (DTYPE == F16) {
        // In range as they are.
        return 1.0;
    }
    return abs(scales[job.x_scales + row]);
}

fn fetch_x(job: Job, row: u32, k: u32, end: u32) -> vec4<u32> {
    if (k < end) {
        return x_words[job.x / 4u + (row * job.width + k) / X_VALUES];
    }
    return vec4<u32>(0u);
}

fn fetch_a(job: Job, row: u32, k: u32, end: u32) -> vec4<f32> {
    if (k < end) {
        return a[(job.a + row * job.width + k) / 4u];
    }
    return vec4<f32>(0.0);
}

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

fn put_a(place: u32, raw: vec4<f32>, scale: f32, has_low: bool) {
    let value = raw * scale;
    let high = high_part(value);
    tile[A_HIGH + place] = vec4<f16>(high);
    if (has_low) {
        tile[A_LOW + place] = vec4<f16>(value - high);
    }
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
    let end = min(start + job.part_width, job.width);

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
    let a_row0 = min(first_column + a_slot, job.rank - 1u);
    let a_row1 = min(first_column + a_slot + A_STEP, job.rank - 1u);

    let x_scale0 = x_scale(job, x_row0);
    let x_scale1 = x_scale(job, x_row1);
    let x_scale2 = x_scale(job, x_row2);
    let x_scale3 = x_scale(job, x_row3);
    let x_scale4 = x_scale(job, x_row4);
    let x_scale5 = x_scale(job, x_row5);
    let x_scale6 = x_scale(job, x_row6);
    let x_scale7 = x_scale(job, x_row7);
    let a_scale0 = abs(scales[job.a_scales + a_row0]);
    let a_scale1 = abs(scales[job.a_scales + a_row1]);
    // Every subgroup finds the same.
    var low = false;
    for (var c = lane; c < TILE_N; c += 32u) {
        low = low || scales[job.a_scales + min(first_column + c, job.rank - 1u)] < 0.0;
    }
    let any_low = subgroupAny(low);
    if (t == 0u) {
        low_rows = u32(any_low);
    }
    let has_low = workgroupUniformLoad(&low_rows) != 0u;

    let tile_row = subgroup / SUBGROUPS_N * 32u;
    let tile_column = subgroup % SUBGROUPS_N * FRAGMENTS_N * 16u;
    let out_row = first_row + tile_row;
    let rows = (job.tokens + TILE_M - 1u) / TILE_M * TILE_M;
    let out = job.parts + (work.w * rows + out_row) * job.stride + first_column + tile_column;

    for (var chunk = start; chunk < end; chunk += CHUNK) {
        var c00: coop_mat16x16<f32, C>;
        var c01: coop_mat16x16<f32, C>;
        var c02: coop_mat16x16<f32, C>;
        var c03: coop_mat16x16<f32, C>;
        var c10: coop_mat16x16<f32, C>;
        var c11: coop_mat16x16<f32, C>;
        var c12: coop_mat16x16<f32, C>;
        var c13: coop_mat16x16<f32, C>;
        for (var k = chunk; k < min(chunk + CHUNK, end); k += DEPTH) {
            let x0 = fetch_x(job, x_row0, k + x_k, end);
            let x1 = fetch_x(job, x_row1, k + x_k, end);
            var x2: vec4<u32>;
            var x3: vec4<u32>;
            var x4: vec4<u32>;
            var x5: vec4<u32>;
            var x6: vec4<u32>;
            var x7: vec4<u32>;
            if (X_LOADS > 2u) {
                x2 = fetch_x(job, x_row2, k + x_k, end);
                x3 = fetch_x(job, x_row3, k + x_k, end);
            }
            if (X_LOADS > 4u) {
                x4 = fetch_x(job, x_row4, k + x_k, end);
                x5 = fetch_x(job, x_row5, k + x_k, end);
                x6 = fetch_x(job, x_row6, k + x_k, end);
                x7 = fetch_x(job, x_row7, k + x_k, end);
            }
            let a0 = fetch_a(job, a_row0, k + a_k, end);
            let a1 = fetch_a(job, a_row1, k + a_k, end);
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
            put_a(a_place, a0, a_scale0, has_low);
            put_a(a_place + A_STEP * STRIDE, a1, a_scale1, has_low);
            workgroupBarrier();
            for (var d = 0u; d < DEPTH / 4u; d += 4u) {
                let stride = STRIDE;
                let x_at = tile_row * STRIDE + d;
                let a_at = tile_column * STRIDE + d;
                let x0_at = X_HIGH + x_at;
                let x1_at = x0_at + 16u * STRIDE;
                let high0_at = A_HIGH + a_at;
                let high1_at = high0_at + 16u * STRIDE;
                let high2_at = high0_at + 32u * STRIDE;
                let high3_at = high0_at + 48u * STRIDE;
                let x_high0 = coopLoadT<coop_mat16x16<f16, A>>(&tile[x0_at], stride);
                let x_high1 = coopLoadT<coop_mat16x16<f16, A>>(&tile[x1_at], stride);
                // Small terms first.
                if (has_low) {
                    let low0_at = A_LOW + a_at;
                    let low1_at = low0_at + 16u * STRIDE;
                    let low0 = coopLoad<coop_mat16x16<f16, B>>(&tile[low0_at], stride);
                    let low1 = coopLoad<coop_mat16x16<f16, B>>(&tile[low1_at], stride);
                    c00 = coopMultiplyAdd(x_high0, low0, c00);
                    c10 = coopMultiplyAdd(x_high1, low0, c10);
                    c01 = coopMultiplyAdd(x_high0, low1, c01);
                    c11 = coopMultiplyAdd(x_high1, low1, c11);
                    if (FRAGMENTS_N == 4u) {
                        let low2_at = low0_at + 32u * STRIDE;
                        let low3_at = low0_at + 48u * STRIDE;
                        let low2 = coopLoad<coop_mat16x16<f16, B>>(&tile[low2_at], stride);
                        let low3 = coopLoad<coop_mat16x16<f16, B>>(&tile[low3_at], stride);
                        c02 = coopMultiplyAdd(x_high0, low2, c02);
                        c12 = coopMultiplyAdd(x_high1, low2, c12);
                        c03 = coopMultiplyAdd(x_high0, low3, c03);
                        c13 = coopMultiplyAdd(x_high1, low3, c13);
                    }
                }
                let high0 = coopLoad<coop_mat16x16<f16, B>>(&tile[high0_at], stride);
                let high1 = coopLoad<coop_mat16x16<f16, B>>(&tile[high1_at], stride);
                // With low parts of X there are two columns of matrices: the shared memory holds no more.
                if (DTYPE == F32) {
                    let x_low0_at = X_LOW + x_at;
                    let x_low1_at = x_low0_at + 16u * STRIDE;
                    let x_low0 = coopLoadT<coop_mat16x16<f16, A>>(&tile[x_low0_at], stride);
                    let x_low1 = coopLoadT<coop_mat16x16<f16, A>>(&tile[x_low1_at], stride);
                    c00 = coopMultiplyAdd(x_low0, high0, c00);
                    c10 = coopMultiplyAdd(x_low1, high0, c10);
                    c01 = coopMultiplyAdd(x_low0, high1, c01);
                    c11 = coopMultiplyAdd(x_low1, high1, c11);
                }
                c00 = coopMultiplyAdd(x_high0, high0, c00);
                c10 = coopMultiplyAdd(x_high1, high0, c10);
                c01 = coopMultiplyAdd(x_high0, high1, c01);
                c11 = coopMultiplyAdd(x_high1, high1, c11);
                if (FRAGMENTS_N == 4u) {
                    let high2 = coopLoad<coop_mat16x16<f16, B>>(&tile[high2_at], stride);
                    let high3 = coopLoad<coop_mat16x16<f16, B>>(&tile[high3_at], stride);
                    c02 = coopMultiplyAdd(x_high0, high2, c02);
                    c12 = coopMultiplyAdd(x_high1, high2, c12);
                    c03 = coopMultiplyAdd(x_high0, high3, c03);
                    c13 = coopMultiplyAdd(x_high1, high3, c13);
                }
            }
        }
        let stride = job.stride;
        let out00 = out;
        let out01 = out + 16u;
        let out02 = out + 32u;
        let out03 = out + 48u;
        let out10 = out + 16u * stride;
        let out11 = out10 + 16u;
        let out12 = out10 + 32u;
        let out13 = out10 + 48u;
        if (t == 0u) {
            continues = u32(chunk > start);
        }
        if (workgroupUniformLoad(&continues) != 0u) {
            // What the chunks before came to waits in memory: registers for a second set of sums would be too many.
            let sum00 = coopLoadT<coop_mat16x16<f32, C>>(&parts[out00], stride);
            let sum01 = coopLoadT<coop_mat16x16<f32, C>>(&parts[out01], stride);
            let sum10 = coopLoadT<coop_mat16x16<f32, C>>(&parts[out10], stride);
            let sum11 = coopLoadT<coop_mat16x16<f32, C>>(&parts[out11], stride);
            c00 = c00 + sum00;
            c01 = c01 + sum01;
            c10 = c10 + sum10;
            c11 = c11 + sum11;
            if (FRAGMENTS_N == 4u) {
                let sum02 = coopLoadT<coop_mat16x16<f32, C>>(&parts[out02], stride);
                let sum03 = coopLoadT<coop_mat16x16<f32, C>>(&parts[out03], stride);
                let sum12 = coopLoadT<coop_mat16x16<f32, C>>(&parts[out12], stride);
                let sum13 = coopLoadT<coop_mat16x16<f32, C>>(&parts[out13], stride);
                c02 = c02 + sum02;
                c03 = c03 + sum03;
                c12 = c12 + sum12;
                c13 = c13 + sum13;
            }
        }
        coopStoreT(c00, &parts[out00], stride);
        coopStoreT(c01, &parts[out01], stride);
        coopStoreT(c10, &parts[out10], stride);
        coopStoreT(c11, &parts[out11], stride);
        if (FRAGMENTS_N == 4u) {
            coopStoreT(c02, &parts[out02], stride);
            coopStoreT(c03, &parts[out03], stride);
            coopStoreT(c12, &parts[out12], stride);
            coopStoreT(c13, &parts[out13], stride);
        }
    }
}

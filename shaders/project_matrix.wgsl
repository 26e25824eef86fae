// Z = X·Aᵀ on matrix units: f16 operands and f32 sums that keep f32's accuracy. The fast twin of
// project.wgsl, for adapters with 16×16×16 f16 to f32 matrices and subgroups of 32.
//
//   X: tokens × width, row-major, f32, f16 or bf16      A: rank × width, f32      Z: tokens × rank, f32
//
// Rows but those of f16 are brought into f16's range by the powers of two of row_scale.wgsl. f16 and bf16 values are
// then exact in f16 (short of 2^-24 of the largest of their row); f32 values are split by mask into a high and a
// low part of 11 bits each, and the products of two low parts left out. The unit's accumulator truncates,
// so it sums at most CHUNK products before they are added in f32.
//
// Work: (job, token tile, rank tile, part). A workgroup of 8 subgroups makes one 128 × 64 tile of Z from
// one part of the width; parts are stored as in project.wgsl.
// Bindings: 3 X as raw words, 4 A, 5 Z, 6 scales of rows of X and A.
// The permutation sets DTYPE.

#import params
#import words
#import fetch

struct Job {
    x: u32,     // first word
    a: u32,     // first element
    z: u32,     // first element
    tokens: u32,
    rank: u32,
    width: u32,
    dtype: u32,
    part_width: u32,    // a multiple of DEPTH
    x_scales: u32,  // first element
    a_scales: u32,  // first element
}

@group(0) @binding(3) var<storage, read> x_words: array<u32>;
@group(0) @binding(4) var<storage, read> a: array<f32>;
@group(0) @binding(5) var<storage, read_write> z: array<f32>;
@group(0) @binding(6) var<storage, read> scales: array<f32>;

const TILE_M: u32 = 128u;
const TILE_N: u32 = 64u;
const DEPTH: u32 = 32u;
const CHUNK: u32 = 256u;
const THREADS: u32 = 256u;
// Padded rows keep the loads of a matrix from meeting in a bank, and stay on 16 bytes.
const STRIDE: u32 = DEPTH + 8u;
const PAIRS: u32 = DEPTH / 2u;
// A thread fetches a pair of values from every 16th row.
const ROW_STEP: u32 = THREADS / PAIRS;

// One array, so that every part of it lies on 16 bytes, which loads of matrices need.
const X_HIGH: u32 = 0u;
const A_HIGH: u32 = X_HIGH + TILE_M * STRIDE;
const A_LOW: u32 = A_HIGH + TILE_N * STRIDE;
const X_LOW: u32 = A_LOW + TILE_N * STRIDE;
const TILE_LEN: u32 = X_LOW + select(0u, TILE_M * STRIDE, DTYPE == F32);
var<workgroup> tile: array<f16, TILE_LEN>;
// One 16 × 16 matrix of each subgroup on its way out.
var<workgroup> patches: array<f32, 2048>;

fn x_scale(job: Job, row: u32) -> f32 {
    if (DTYPE == F16) {
        // In range as they are.
        return 1.0;
    }
    return scales[job.x_scales + min(row, job.tokens - 1u)];
}

fn a_scale(job: Job, row: u32) -> f32 {
    return scales[job.a_scales + min(row, job.rank - 1u)];
}

// The upper 11 bits of the mantissa, which f16 holds. By mask: f32(f16(v)) is folded away.
fn high_part(value: vec2<f32>) -> vec2<f32> {
    return bitcast<vec2<f32>>(bitcast<vec2<u32>>(value) & vec2<u32>(0xffffe000u));
}

fn put(place: u32, value: vec2<f32>) {
    let narrow = vec2<f16>(value);
    tile[place] = narrow.x;
    tile[place + 1u] = narrow.y;
}

fn put_x(place: u32, value: vec2<f32>) {
    if (DTYPE == F32) {
        let high = high_part(value);
        put(X_HIGH + place, high);
        put(X_LOW + place, value - high);
    } else {
        put(X_HIGH + place, value);
    }
}

fn put_a(place: u32, value: vec2<f32>) {
    let high = high_part(value);
    put(A_HIGH + place, high);
    put(A_LOW + place, value - high);
}

// 1 / s of a power of two, exactly.
fn inverse_power(s: f32) -> f32 {
    return bitcast<f32>((254u << 23u) - bitcast<u32>(s));
}

// Writes the patch of each subgroup to Z.
fn store_patch(job: Job, part: u32, row: u32, column: u32, subgroup: u32, lane: u32) {
    workgroupBarrier();
    for (var q = 0u; q < 8u; q++) {
        let e = q * 32u + lane;
        let r = row + e / 16u;
        let c = column + e % 16u;
        if (r < job.tokens && c < job.rank) {
            let scale = inverse_power(x_scale(job, r)) * inverse_power(a_scale(job, c));
            z[job.z + (part * job.tokens + r) * job.rank + c] = patches[subgroup * 256u + e] * scale;
        }
    }
    workgroupBarrier();
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

    let pair = t % PAIRS;
    let slot = t / PAIRS;
    let row = first_row + slot;
    let column = first_column + slot;
    let place = slot * STRIDE + pair * 2u;
    const PLACE_STEP = ROW_STEP * STRIDE;
    let x_inside = job.width % 2u == 0u && first_row + TILE_M <= job.tokens;
    let a_inside = job.width % 2u == 0u && first_column + TILE_N <= job.rank;

    // Arrays of these would be kept in memory, and fetched one after the other.
    let xs0 = x_scale(job, row);
    let xs1 = x_scale(job, row + ROW_STEP);
    let xs2 = x_scale(job, row + ROW_STEP * 2u);
    let xs3 = x_scale(job, row + ROW_STEP * 3u);
    let xs4 = x_scale(job, row + ROW_STEP * 4u);
    let xs5 = x_scale(job, row + ROW_STEP * 5u);
    let xs6 = x_scale(job, row + ROW_STEP * 6u);
    let xs7 = x_scale(job, row + ROW_STEP * 7u);
    let as0 = a_scale(job, column);
    let as1 = a_scale(job, column + ROW_STEP);
    let as2 = a_scale(job, column + ROW_STEP * 2u);
    let as3 = a_scale(job, column + ROW_STEP * 3u);

    // Each subgroup has 32 × 32 of the tile, as 2 × 2 matrices.
    let tile_row = subgroup / 2u * 32u;
    let tile_column = subgroup % 2u * 32u;
    var sum00: coop_mat16x16<f32, C>;
    var sum01: coop_mat16x16<f32, C>;
    var sum10: coop_mat16x16<f32, C>;
    var sum11: coop_mat16x16<f32, C>;

    // What is fetched for the next step while one is computed.
    var x0: Pair;
    var x1: Pair;
    var x2: Pair;
    var x3: Pair;
    var x4: Pair;
    var x5: Pair;
    var x6: Pair;
    var x7: Pair;
    var a0: vec2<f32>;
    var a1: vec2<f32>;
    var a2: vec2<f32>;
    var a3: vec2<f32>;

    for (var chunk = start; chunk < end; chunk += CHUNK) {
        var c00: coop_mat16x16<f32, C>;
        var c01: coop_mat16x16<f32, C>;
        var c10: coop_mat16x16<f32, C>;
        var c11: coop_mat16x16<f32, C>;
        for (var k = chunk; k < min(chunk + CHUNK, end); k += DEPTH) {
            if (k == start) {
                let kk = k + pair * 2u;
                if (x_inside && k + DEPTH <= end) {
                    x0 = fetch_x(job, row, kk);
                    x1 = fetch_x(job, row + ROW_STEP, kk);
                    x2 = fetch_x(job, row + ROW_STEP * 2u, kk);
                    x3 = fetch_x(job, row + ROW_STEP * 3u, kk);
                    x4 = fetch_x(job, row + ROW_STEP * 4u, kk);
                    x5 = fetch_x(job, row + ROW_STEP * 5u, kk);
                    x6 = fetch_x(job, row + ROW_STEP * 6u, kk);
                    x7 = fetch_x(job, row + ROW_STEP * 7u, kk);
                } else {
                    x0 = fetch_x_checked(job, row, kk, end);
                    x1 = fetch_x_checked(job, row + ROW_STEP, kk, end);
                    x2 = fetch_x_checked(job, row + ROW_STEP * 2u, kk, end);
                    x3 = fetch_x_checked(job, row + ROW_STEP * 3u, kk, end);
                    x4 = fetch_x_checked(job, row + ROW_STEP * 4u, kk, end);
                    x5 = fetch_x_checked(job, row + ROW_STEP * 5u, kk, end);
                    x6 = fetch_x_checked(job, row + ROW_STEP * 6u, kk, end);
                    x7 = fetch_x_checked(job, row + ROW_STEP * 7u, kk, end);
                }
                if (a_inside && k + DEPTH <= end) {
                    a0 = fetch_a(job, column, kk);
                    a1 = fetch_a(job, column + ROW_STEP, kk);
                    a2 = fetch_a(job, column + ROW_STEP * 2u, kk);
                    a3 = fetch_a(job, column + ROW_STEP * 3u, kk);
                } else {
                    a0 = fetch_a_checked(job, column, kk, end);
                    a1 = fetch_a_checked(job, column + ROW_STEP, kk, end);
                    a2 = fetch_a_checked(job, column + ROW_STEP * 2u, kk, end);
                    a3 = fetch_a_checked(job, column + ROW_STEP * 3u, kk, end);
                }
            }
            workgroupBarrier();
            put_x(place, x_values(x0) * xs0);
            put_x(place + PLACE_STEP, x_values(x1) * xs1);
            put_x(place + PLACE_STEP * 2u, x_values(x2) * xs2);
            put_x(place + PLACE_STEP * 3u, x_values(x3) * xs3);
            put_x(place + PLACE_STEP * 4u, x_values(x4) * xs4);
            put_x(place + PLACE_STEP * 5u, x_values(x5) * xs5);
            put_x(place + PLACE_STEP * 6u, x_values(x6) * xs6);
            put_x(place + PLACE_STEP * 7u, x_values(x7) * xs7);
            put_a(place, a0 * as0);
            put_a(place + PLACE_STEP, a1 * as1);
            put_a(place + PLACE_STEP * 2u, a2 * as2);
            put_a(place + PLACE_STEP * 3u, a3 * as3);
            workgroupBarrier();
            let next = k + DEPTH;
            if (next < end) {
                let kk = next + pair * 2u;
                if (x_inside && next + DEPTH <= end) {
                    x0 = fetch_x(job, row, kk);
                    x1 = fetch_x(job, row + ROW_STEP, kk);
                    x2 = fetch_x(job, row + ROW_STEP * 2u, kk);
                    x3 = fetch_x(job, row + ROW_STEP * 3u, kk);
                    x4 = fetch_x(job, row + ROW_STEP * 4u, kk);
                    x5 = fetch_x(job, row + ROW_STEP * 5u, kk);
                    x6 = fetch_x(job, row + ROW_STEP * 6u, kk);
                    x7 = fetch_x(job, row + ROW_STEP * 7u, kk);
                } else {
                    x0 = fetch_x_checked(job, row, kk, end);
                    x1 = fetch_x_checked(job, row + ROW_STEP, kk, end);
                    x2 = fetch_x_checked(job, row + ROW_STEP * 2u, kk, end);
                    x3 = fetch_x_checked(job, row + ROW_STEP * 3u, kk, end);
                    x4 = fetch_x_checked(job, row + ROW_STEP * 4u, kk, end);
                    x5 = fetch_x_checked(job, row + ROW_STEP * 5u, kk, end);
                    x6 = fetch_x_checked(job, row + ROW_STEP * 6u, kk, end);
                    x7 = fetch_x_checked(job, row + ROW_STEP * 7u, kk, end);
                }
                if (a_inside && next + DEPTH <= end) {
                    a0 = fetch_a(job, column, kk);
                    a1 = fetch_a(job, column + ROW_STEP, kk);
                    a2 = fetch_a(job, column + ROW_STEP * 2u, kk);
                    a3 = fetch_a(job, column + ROW_STEP * 3u, kk);
                } else {
                    a0 = fetch_a_checked(job, column, kk, end);
                    a1 = fetch_a_checked(job, column + ROW_STEP, kk, end);
                    a2 = fetch_a_checked(job, column + ROW_STEP * 2u, kk, end);
                    a3 = fetch_a_checked(job, column + ROW_STEP * 3u, kk, end);
                }
            }
            for (var d = 0u; d < DEPTH; d += 16u) {
                let stride = STRIDE;
                let x_at = tile_row * STRIDE + d;
                let a_at = tile_column * STRIDE + d;
                let x_high0_at = X_HIGH + x_at;
                let x_high1_at = X_HIGH + x_at + 16u * STRIDE;
                let a_high0_at = A_HIGH + a_at;
                let a_high1_at = A_HIGH + a_at + 16u * STRIDE;
                let a_low0_at = A_LOW + a_at;
                let a_low1_at = A_LOW + a_at + 16u * STRIDE;
                let x_high0 = coopLoadT<coop_mat16x16<f16, A>>(&tile[x_high0_at], stride);
                let high0 = coopLoad<coop_mat16x16<f16, B>>(&tile[a_high0_at], stride);
                let high1 = coopLoad<coop_mat16x16<f16, B>>(&tile[a_high1_at], stride);
                let low0 = coopLoad<coop_mat16x16<f16, B>>(&tile[a_low0_at], stride);
                let low1 = coopLoad<coop_mat16x16<f16, B>>(&tile[a_low1_at], stride);
                // Small terms first.
                if (DTYPE == F32) {
                    let x_low0_at = X_LOW + x_at;
                    let x_low0 = coopLoadT<coop_mat16x16<f16, A>>(&tile[x_low0_at], stride);
                    c00 = coopMultiplyAdd(x_low0, high0, c00);
                    c01 = coopMultiplyAdd(x_low0, high1, c01);
                }
                c00 = coopMultiplyAdd(x_high0, low0, c00);
                c01 = coopMultiplyAdd(x_high0, low1, c01);
                c00 = coopMultiplyAdd(x_high0, high0, c00);
                c01 = coopMultiplyAdd(x_high0, high1, c01);
                let x_high1 = coopLoadT<coop_mat16x16<f16, A>>(&tile[x_high1_at], stride);
                if (DTYPE == F32) {
                    let x_low1_at = X_LOW + x_at + 16u * STRIDE;
                    let x_low1 = coopLoadT<coop_mat16x16<f16, A>>(&tile[x_low1_at], stride);
                    c10 = coopMultiplyAdd(x_low1, high0, c10);
                    c11 = coopMultiplyAdd(x_low1, high1, c11);
                }
                c10 = coopMultiplyAdd(x_high1, low0, c10);
                c11 = coopMultiplyAdd(x_high1, low1, c11);
                c10 = coopMultiplyAdd(x_high1, high0, c10);
                c11 = coopMultiplyAdd(x_high1, high1, c11);
            }
        }
        sum00 = sum00 + c00;
        sum01 = sum01 + c01;
        sum10 = sum10 + c10;
        sum11 = sum11 + c11;
    }

    let patch_at = subgroup * 256u;
    let patch_stride = 16u;
    let out_row = first_row + tile_row;
    let out_column = first_column + tile_column;
    coopStoreT(sum00, &patches[patch_at], patch_stride);
    store_patch(job, work.w, out_row, out_column, subgroup, lane);
    coopStoreT(sum01, &patches[patch_at], patch_stride);
    store_patch(job, work.w, out_row, out_column + 16u, subgroup, lane);
    coopStoreT(sum10, &patches[patch_at], patch_stride);
    store_patch(job, work.w, out_row + 16u, out_column, subgroup, lane);
    coopStoreT(sum11, &patches[patch_at], patch_stride);
    store_patch(job, work.w, out_row + 16u, out_column + 16u, subgroup, lane);
}

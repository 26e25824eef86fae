// Z = X·Aᵀ in f32: what rank-concatenated A sees of the activations.
//
//   X: tokens × width, row-major, f32, f16 or bf16      A: rank × width, f32      Z: tokens × rank, f32
//
// Work: (job, token tile, rank tile, part). A workgroup makes one TILE_M × TILE_N tile of Z from one part
// of the width (split-K); part p is stored at z + p·tokens·rank, and the reader adds the parts in order.
// Bindings: 3 X as raw words, 4 A, 5 Z.
// The permutation sets TILE_M, TILE_N and COLUMNS (columns of a thread); see tile_f32.wgsl.

#import params
#import words
#import tile_f32

struct Job {
    x: u32,     // first word
    a: u32,     // first element
    z: u32,     // first element
    tokens: u32,
    rank: u32,
    width: u32,
    dtype: u32,
    part_width: u32,    // a multiple of DEPTH
}

@group(0) @binding(3) var<storage, read> x_words: array<u32>;
@group(0) @binding(4) var<storage, read> a: array<f32>;
@group(0) @binding(5) var<storage, read_write> z: array<f32>;

const DEPTH: u32 = 16u;
const THREADS_N: u32 = TILE_N / COLUMNS;
const THREADS: u32 = TILE_M / 8u * THREADS_N;
// A thread fetches blocks of 4 rows × 2 columns, so that it can store whole vectors of 4 rows.
const X_BLOCKS: u32 = TILE_M * 2u / THREADS;
const A_BLOCKS: u32 = max(TILE_N * 2u / THREADS, 1u);
const QUADS_M: u32 = TILE_M / 4u;
const QUADS_N: u32 = TILE_N / 4u;

// [k][row / 4] vectors of 4 rows
var<workgroup> x_tile: array<vec4<f32>, DEPTH * QUADS_M>;
var<workgroup> a_tile: array<vec4<f32>, DEPTH * QUADS_N>;

// X[row, k] and X[row, k + 1]; zero outside. `end` bounds k.
fn load_x(job: Job, row: u32, k: u32, end: u32) -> vec2<f32> {
    if (row >= job.tokens || k >= end) {
        return vec2<f32>(0.0);
    }
    let e = row * job.width + k;
    let both = k + 1u < end;
    if (job.dtype == F32) {
        let first = bitcast<f32>(x_words[job.x + e]);
        if (both) {
            return vec2<f32>(first, bitcast<f32>(x_words[job.x + e + 1u]));
        }
        return vec2<f32>(first, 0.0);
    }
    let pair = unpack_halves(x_words[job.x + e / 2u], job.dtype);
    if ((e & 1u) == 0u) {
        return vec2<f32>(pair.x, select(0.0, pair.y, both));
    }
    if (both) {
        return vec2<f32>(pair.y, unpack_halves(x_words[job.x + e / 2u + 1u], job.dtype).x);
    }
    return vec2<f32>(pair.y, 0.0);
}

fn load_a(job: Job, row: u32, k: u32, end: u32) -> vec2<f32> {
    if (row >= job.rank || k >= end) {
        return vec2<f32>(0.0);
    }
    let e = job.a + row * job.width + k;
    if (k + 1u < end) {
        return vec2<f32>(a[e], a[e + 1u]);
    }
    return vec2<f32>(a[e], 0.0);
}

fn store_row(job: Job, part: u32, row: u32, column: u32, values: vec4<f32>) {
    if (row < job.tokens) {
        let e = job.z + (part * job.tokens + row) * job.rank + column;
        if (column < job.rank) { z[e] = values.x; }
        if (column + 1u < job.rank) { z[e + 1u] = values.y; }
        if (column + 2u < job.rank) { z[e + 2u] = values.z; }
        if (column + 3u < job.rank) { z[e + 3u] = values.w; }
    }
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let first_row = work.y * TILE_M;
    let first_column = work.z * TILE_N;
    let start = work.w * job.part_width;
    let end = min(start + job.part_width, job.width);

    // Blocks are numbered along k first, so that neighbours read neighbouring words.
    let pair = t % (DEPTH / 2u);
    let quad = t / (DEPTH / 2u);
    const QUAD_STEP = THREADS / (DEPTH / 2u);

    let row_quad = t / THREADS_N;
    let column_quad = t % THREADS_N;

    for (var k = start; k < end; k += DEPTH) {
        let kk = k + pair * 2u;
        var x_even: array<vec4<f32>, X_BLOCKS>;
        var x_odd: array<vec4<f32>, X_BLOCKS>;
        for (var b = 0u; b < X_BLOCKS; b++) {
            let row = first_row + (quad + b * QUAD_STEP) * 4u;
            let r0 = load_x(job, row, kk, end);
            let r1 = load_x(job, row + 1u, kk, end);
            let r2 = load_x(job, row + 2u, kk, end);
            let r3 = load_x(job, row + 3u, kk, end);
            x_even[b] = vec4<f32>(r0.x, r1.x, r2.x, r3.x);
            x_odd[b] = vec4<f32>(r0.y, r1.y, r2.y, r3.y);
        }
        var a_even: array<vec4<f32>, A_BLOCKS>;
        var a_odd: array<vec4<f32>, A_BLOCKS>;
        for (var b = 0u; b < A_BLOCKS; b++) {
            let row = first_column + (quad + b * QUAD_STEP) * 4u;
            let r0 = load_a(job, row, kk, end);
            let r1 = load_a(job, row + 1u, kk, end);
            let r2 = load_a(job, row + 2u, kk, end);
            let r3 = load_a(job, row + 3u, kk, end);
            a_even[b] = vec4<f32>(r0.x, r1.x, r2.x, r3.x);
            a_odd[b] = vec4<f32>(r0.y, r1.y, r2.y, r3.y);
        }
        workgroupBarrier();
        for (var b = 0u; b < X_BLOCKS; b++) {
            x_tile[pair * 2u * QUADS_M + quad + b * QUAD_STEP] = x_even[b];
            x_tile[(pair * 2u + 1u) * QUADS_M + quad + b * QUAD_STEP] = x_odd[b];
        }
        for (var b = 0u; b < A_BLOCKS; b++) {
            if (quad + b * QUAD_STEP < QUADS_N) {
                a_tile[pair * 2u * QUADS_N + quad + b * QUAD_STEP] = a_even[b];
                a_tile[(pair * 2u + 1u) * QUADS_N + quad + b * QUAD_STEP] = a_odd[b];
            }
        }
        workgroupBarrier();
        for (var d = 0u; d < DEPTH; d++) {
            tile_step(
                x_tile[d * QUADS_M + row_quad],
                x_tile[d * QUADS_M + QUADS_M / 2u + row_quad],
                a_tile[d * QUADS_N + column_quad],
                a_tile[d * QUADS_N + QUADS_N - THREADS_N + column_quad],
            );
        }
    }

    let low = first_row + row_quad * 4u;
    let high = low + TILE_M / 2u;
    let left = first_column + column_quad * 4u;
    store_row(job, work.w, low, left, c0);
    store_row(job, work.w, low + 1u, left, c1);
    store_row(job, work.w, low + 2u, left, c2);
    store_row(job, work.w, low + 3u, left, c3);
    store_row(job, work.w, high, left, c4);
    store_row(job, work.w, high + 1u, left, c5);
    store_row(job, work.w, high + 2u, left, c6);
    store_row(job, work.w, high + 3u, left, c7);
    if (COLUMNS == 8u) {
        let right = left + TILE_N / 2u;
        store_row(job, work.w, low, right, d0);
        store_row(job, work.w, low + 1u, right, d1);
        store_row(job, work.w, low + 2u, right, d2);
        store_row(job, work.w, low + 3u, right, d3);
        store_row(job, work.w, high, right, d4);
        store_row(job, work.w, high + 1u, right, d5);
        store_row(job, work.w, high + 2u, right, d6);
        store_row(job, work.w, high + 3u, right, d7);
    }
}

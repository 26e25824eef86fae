// Z = X·Aᵀ in f32: what rank-concatenated A sees of the activations.
//
//   X: tokens × width, row-major, f32, f16 or bf16      A: rank × width, f32      Z: tokens × rank, f32
//
// Work: (job, token tile, rank tile, part). A workgroup makes one TILE_M × TILE_N tile of Z from one part
// of the width (split-K); part p is stored at z + p·tokens·rank, and the reader adds the parts in order.
// Bindings: 3 X as raw words, 4 A, 5 Z.
// The permutation sets TILE_M, TILE_N, COLUMNS and THREADS_N = TILE_N / COLUMNS; see tile_f32.wgsl.

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
const THREADS: u32 = TILE_M / 8u * THREADS_N;
// A thread fetches blocks of 4 rows × 2 columns, so that it can store whole vectors of 4 rows.
const X_BLOCKS: u32 = TILE_M * 2u / THREADS;
const A_BLOCKS: u32 = max(TILE_N * 2u / THREADS, 1u);
const QUAD_STEP: u32 = THREADS / (DEPTH / 2u);
const QUADS_M: u32 = TILE_M / 4u;
const QUADS_N: u32 = TILE_N / 4u;

// [k][row / 4] vectors of 4 rows. Column `row / 4` is XORed with k / 2, so that the 8 threads that store
// the 16 values of k of the same rows do not meet in a bank.
var<workgroup> x_tile: array<vec4<f32>, DEPTH * QUADS_M>;
var<workgroup> a_tile: array<vec4<f32>, DEPTH * QUADS_N>;

// X[row, k] and X[row, k + 1]; zero outside. `end` bounds k.
fn load_x_checked(job: Job, row: u32, k: u32, end: u32) -> vec2<f32> {
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

// The same where row and k + 1 are inside and the width is even.
fn load_x_inside(job: Job, row: u32, k: u32) -> vec2<f32> {
    let e = row * job.width + k;
    if (job.dtype == F32) {
        return vec2<f32>(bitcast<f32>(x_words[job.x + e]), bitcast<f32>(x_words[job.x + e + 1u]));
    }
    return unpack_halves(x_words[job.x + e / 2u], job.dtype);
}

fn load_a_checked(job: Job, row: u32, k: u32, end: u32) -> vec2<f32> {
    if (row >= job.rank || k >= end) {
        return vec2<f32>(0.0);
    }
    let e = job.a + row * job.width + k;
    if (k + 1u < end) {
        return vec2<f32>(a[e], a[e + 1u]);
    }
    return vec2<f32>(a[e], 0.0);
}

fn load_a_inside(job: Job, row: u32, k: u32) -> vec2<f32> {
    let e = job.a + row * job.width + k;
    return vec2<f32>(a[e], a[e + 1u]);
}

// What a thread fetches for the next step while it computes this one: 4 rows at an even and an odd k.
var<private> x_even: array<vec4<f32>, X_BLOCKS>;
var<private> x_odd: array<vec4<f32>, X_BLOCKS>;
var<private> a_even: array<vec4<f32>, A_BLOCKS>;
var<private> a_odd: array<vec4<f32>, A_BLOCKS>;

fn fetch_x(job: Job, first_row: u32, quad: u32, k: u32, end: u32, inside: bool) {
    for (var b = 0u; b < X_BLOCKS; b++) {
        let row = first_row + (quad + b * QUAD_STEP) * 4u;
        var r0: vec2<f32>;
        var r1: vec2<f32>;
        var r2: vec2<f32>;
        var r3: vec2<f32>;
        if (inside) {
            r0 = load_x_inside(job, row, k);
            r1 = load_x_inside(job, row + 1u, k);
            r2 = load_x_inside(job, row + 2u, k);
            r3 = load_x_inside(job, row + 3u, k);
        } else {
            r0 = load_x_checked(job, row, k, end);
            r1 = load_x_checked(job, row + 1u, k, end);
            r2 = load_x_checked(job, row + 2u, k, end);
            r3 = load_x_checked(job, row + 3u, k, end);
        }
        x_even[b] = vec4<f32>(r0.x, r1.x, r2.x, r3.x);
        x_odd[b] = vec4<f32>(r0.y, r1.y, r2.y, r3.y);
    }
}

fn fetch_a(job: Job, first_row: u32, quad: u32, k: u32, end: u32, inside: bool) {
    for (var b = 0u; b < A_BLOCKS; b++) {
        let row = first_row + (quad + b * QUAD_STEP) * 4u;
        var r0: vec2<f32>;
        var r1: vec2<f32>;
        var r2: vec2<f32>;
        var r3: vec2<f32>;
        if (inside && quad + b * QUAD_STEP < QUADS_N) {
            r0 = load_a_inside(job, row, k);
            r1 = load_a_inside(job, row + 1u, k);
            r2 = load_a_inside(job, row + 2u, k);
            r3 = load_a_inside(job, row + 3u, k);
        } else {
            r0 = load_a_checked(job, row, k, end);
            r1 = load_a_checked(job, row + 1u, k, end);
            r2 = load_a_checked(job, row + 2u, k, end);
            r3 = load_a_checked(job, row + 3u, k, end);
        }
        a_even[b] = vec4<f32>(r0.x, r1.x, r2.x, r3.x);
        a_odd[b] = vec4<f32>(r0.y, r1.y, r2.y, r3.y);
    }
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
    let even_width = job.width % 2u == 0u;
    let x_inside = even_width && first_row + TILE_M <= job.tokens;
    let a_inside = even_width && first_column + TILE_N <= job.rank;

    let row_quad = tile_row_quad(t);
    let column_quad = tile_column_quad(t);

    fetch_x(job, first_row, quad, start + pair * 2u, end, x_inside && start + DEPTH <= end);
    fetch_a(job, first_column, quad, start + pair * 2u, end, a_inside && start + DEPTH <= end);
    for (var k = start; k < end; k += DEPTH) {
        workgroupBarrier();
        for (var b = 0u; b < X_BLOCKS; b++) {
            let place = pair * 2u * QUADS_M + ((quad + b * QUAD_STEP) ^ pair);
            x_tile[place] = x_even[b];
            x_tile[place + QUADS_M] = x_odd[b];
        }
        for (var b = 0u; b < A_BLOCKS; b++) {
            if (quad + b * QUAD_STEP < QUADS_N) {
                let place = pair * 2u * QUADS_N + ((quad + b * QUAD_STEP) ^ pair);
                a_tile[place] = a_even[b];
                a_tile[place + QUADS_N] = a_odd[b];
            }
        }
        workgroupBarrier();
        let next = k + DEPTH;
        if (next < end) {
            fetch_x(job, first_row, quad, next + pair * 2u, end, x_inside && next + DEPTH <= end);
            fetch_a(job, first_column, quad, next + pair * 2u, end, a_inside && next + DEPTH <= end);
        }
        for (var d = 0u; d < DEPTH; d++) {
            let swizzle = d / 2u;
            tile_step(
                x_tile[d * QUADS_M + (row_quad ^ swizzle)],
                x_tile[d * QUADS_M + ((QUADS_M / 2u + row_quad) ^ swizzle)],
                a_tile[d * QUADS_N + (column_quad ^ swizzle)],
                a_tile[d * QUADS_N + ((QUADS_N - THREADS_N + column_quad) ^ swizzle)],
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

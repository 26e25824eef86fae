// Z = X·Aᵀ in f32: what rank-concatenated A sees of the activations.
//
//   X: tokens × width, row-major, f32, f16 or bf16      A: rank × width, f32      Z: tokens × rank, f32
//
// Work: (job, token tile, rank tile, part). A workgroup makes one TILE_M × TILE_N tile of Z from one part
// of the width (split-K), a matrix with rows of `stride`; sum_parts.wgsl adds the parts.
// Bindings: 3 X as raw words, 4 A, 5 Z or its parts.
// The permutation sets DTYPE, TILE_M, TILE_N, COLUMNS and THREADS_N = TILE_N / COLUMNS; see tile_f32.wgsl.

#import shared/params
#import shared/words
#import shared/fetch
#import shared/tile_f32

struct Job {
    x: u32,     // first word
    a: u32,     // first element
    z: u32,     // first element
    tokens: u32,
    rank: u32,
    width: u32,
    stride: u32,
    part_width: u32,    // a multiple of DEPTH
}

@group(0) @binding(3) var<storage, read> x_words: array<u32>;
@group(0) @binding(4) var<storage, read> a: array<f32>;
@group(0) @binding(5) var<storage, read_write> z: array<f32>;

const DEPTH: u32 = 16u;
const THREADS: u32 = TILE_M / 8u * THREADS_N;
// A thread fetches blocks of 4 rows × 2 columns, so that it can store whole vectors of 4 rows.
const TWO_X_BLOCKS: bool = TILE_M * 2u / THREADS == 2u;
const QUAD_STEP: u32 = THREADS / (DEPTH / 2u);
const QUADS_M: u32 = TILE_M / 4u;
const QUADS_N: u32 = TILE_N / 4u;

// [k][row / 4] vectors of 4 rows. Column `row / 4` is XORed with k / 2, so that the 8 threads that store
// the 16 values of k of the same rows do not meet in a bank.
var<workgroup> x_tile: array<vec4<f32>, DEPTH * QUADS_M>;
var<workgroup> a_tile: array<vec4<f32>, DEPTH * QUADS_N>;

// Stores 4 rows of a pair as two vectors.
fn put_x(pair: u32, quad: u32, r0: vec2<f32>, r1: vec2<f32>, r2: vec2<f32>, r3: vec2<f32>) {
    let place = pair * 2u * QUADS_M + (quad ^ pair);
    x_tile[place] = vec4<f32>(r0.x, r1.x, r2.x, r3.x);
    x_tile[place + QUADS_M] = vec4<f32>(r0.y, r1.y, r2.y, r3.y);
}

// Adds the products of both values of a pair.
fn multiply(pair: u32, row_quad: u32, column_quad: u32) {
    let x0 = pair * 2u * QUADS_M + (row_quad ^ pair);
    let x1 = pair * 2u * QUADS_M + ((QUADS_M / 2u + row_quad) ^ pair);
    let a0 = pair * 2u * QUADS_N + (column_quad ^ pair);
    let a1 = pair * 2u * QUADS_N + ((QUADS_N - THREADS_N + column_quad) ^ pair);
    tile_step(x_tile[x0], x_tile[x1], a_tile[a0], a_tile[a1]);
    tile_step(x_tile[x0 + QUADS_M], x_tile[x1 + QUADS_M], a_tile[a0 + QUADS_N], a_tile[a1 + QUADS_N]);
}

fn store_row(job: Job, part: u32, row: u32, column: u32, values: vec4<f32>) {
    if (row < job.tokens) {
        let e = job.z + (part * job.tokens + row) * job.stride + column;
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

    let row = first_row + quad * 4u;
    let column = first_column + quad * 4u;
    // What is fetched for the next step while one is computed: 4 rows of a pair each.
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
    let start_pair = start + pair * 2u;
    if (x_inside && start + DEPTH <= end) {
        x0 = fetch_x(job, row + 0u, start_pair);
        x1 = fetch_x(job, row + 1u, start_pair);
        x2 = fetch_x(job, row + 2u, start_pair);
        x3 = fetch_x(job, row + 3u, start_pair);
        if (TWO_X_BLOCKS) {
            x4 = fetch_x(job, row + QUAD_STEP * 4u + 0u, start_pair);
            x5 = fetch_x(job, row + QUAD_STEP * 4u + 1u, start_pair);
            x6 = fetch_x(job, row + QUAD_STEP * 4u + 2u, start_pair);
            x7 = fetch_x(job, row + QUAD_STEP * 4u + 3u, start_pair);
        }
    } else {
        x0 = fetch_x_checked(job, row + 0u, start_pair, end);
        x1 = fetch_x_checked(job, row + 1u, start_pair, end);
        x2 = fetch_x_checked(job, row + 2u, start_pair, end);
        x3 = fetch_x_checked(job, row + 3u, start_pair, end);
        if (TWO_X_BLOCKS) {
            x4 = fetch_x_checked(job, row + QUAD_STEP * 4u + 0u, start_pair, end);
            x5 = fetch_x_checked(job, row + QUAD_STEP * 4u + 1u, start_pair, end);
            x6 = fetch_x_checked(job, row + QUAD_STEP * 4u + 2u, start_pair, end);
            x7 = fetch_x_checked(job, row + QUAD_STEP * 4u + 3u, start_pair, end);
        }
    }
    if (a_inside && start + DEPTH <= end && quad < QUADS_N) {
        a0 = fetch_a(job, column + 0u, start_pair);
        a1 = fetch_a(job, column + 1u, start_pair);
        a2 = fetch_a(job, column + 2u, start_pair);
        a3 = fetch_a(job, column + 3u, start_pair);
    } else {
        a0 = fetch_a_checked(job, column + 0u, start_pair, end);
        a1 = fetch_a_checked(job, column + 1u, start_pair, end);
        a2 = fetch_a_checked(job, column + 2u, start_pair, end);
        a3 = fetch_a_checked(job, column + 3u, start_pair, end);
    }
    for (var k = start; k < end; k += DEPTH) {
        workgroupBarrier();
        put_x(pair, quad, x_values(x0), x_values(x1), x_values(x2), x_values(x3));
        if (TWO_X_BLOCKS) {
            put_x(pair, quad + QUAD_STEP, x_values(x4), x_values(x5), x_values(x6), x_values(x7));
        }
        if (quad < QUADS_N) {
            let place = pair * 2u * QUADS_N + (quad ^ pair);
            a_tile[place] = vec4<f32>(a0.x, a1.x, a2.x, a3.x);
            a_tile[place + QUADS_N] = vec4<f32>(a0.y, a1.y, a2.y, a3.y);
        }
        workgroupBarrier();
        let next = k + DEPTH;
        if (next < end) {
            let next_pair = next + pair * 2u;
            if (x_inside && next + DEPTH <= end) {
                x0 = fetch_x(job, row + 0u, next_pair);
                x1 = fetch_x(job, row + 1u, next_pair);
                x2 = fetch_x(job, row + 2u, next_pair);
                x3 = fetch_x(job, row + 3u, next_pair);
                if (TWO_X_BLOCKS) {
                    x4 = fetch_x(job, row + QUAD_STEP * 4u + 0u, next_pair);
                    x5 = fetch_x(job, row + QUAD_STEP * 4u + 1u, next_pair);
                    x6 = fetch_x(job, row + QUAD_STEP * 4u + 2u, next_pair);
                    x7 = fetch_x(job, row + QUAD_STEP * 4u + 3u, next_pair);
                }
            } else {
                x0 = fetch_x_checked(job, row + 0u, next_pair, end);
                x1 = fetch_x_checked(job, row + 1u, next_pair, end);
                x2 = fetch_x_checked(job, row + 2u, next_pair, end);
                x3 = fetch_x_checked(job, row + 3u, next_pair, end);
                if (TWO_X_BLOCKS) {
                    x4 = fetch_x_checked(job, row + QUAD_STEP * 4u + 0u, next_pair, end);
                    x5 = fetch_x_checked(job, row + QUAD_STEP * 4u + 1u, next_pair, end);
                    x6 = fetch_x_checked(job, row + QUAD_STEP * 4u + 2u, next_pair, end);
                    x7 = fetch_x_checked(job, row + QUAD_STEP * 4u + 3u, next_pair, end);
                }
            }
            if (a_inside && next + DEPTH <= end && quad < QUADS_N) {
                a0 = fetch_a(job, column + 0u, next_pair);
                a1 = fetch_a(job, column + 1u, next_pair);
                a2 = fetch_a(job, column + 2u, next_pair);
                a3 = fetch_a(job, column + 3u, next_pair);
            } else {
                a0 = fetch_a_checked(job, column + 0u, next_pair, end);
                a1 = fetch_a_checked(job, column + 1u, next_pair, end);
                a2 = fetch_a_checked(job, column + 2u, next_pair, end);
                a3 = fetch_a_checked(job, column + 3u, next_pair, end);
            }
        }
        // The products are written out: as a loop, which compilers leave it, they take a fifth longer.
        multiply(0u, row_quad, column_quad);
        multiply(1u, row_quad, column_quad);
        multiply(2u, row_quad, column_quad);
        multiply(3u, row_quad, column_quad);
        multiply(4u, row_quad, column_quad);
        multiply(5u, row_quad, column_quad);
        multiply(6u, row_quad, column_quad);
        multiply(7u, row_quad, column_quad);
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

// Partial Gram matrices in f32: G = ZᵀZ over some tokens, lower triangle.
//
//   Z: tokens × rank, row-major
//   G: one rank × rank matrix for each part of the tokens, stored one after the other
//
// Work: (job, tile row, tile column, part). A workgroup makes one TILE × TILE tile of one partial G; only
// elements with row >= column are written. gram_reduce.wgsl adds the parts.
// Bindings: 3 Z, 4 partial G. The permutation sets TILE, COLUMNS and THREADS_N = TILE /
// COLUMNS; see tile_f32.wgsl.

#import shared/params
#import shared/tile_f32

struct Job {
    z: u32,     // first element
    gram: u32,  // first element
    tokens: u32,
    rank: u32,
    part_tokens: u32,   // tokens of a part
}

@group(0) @binding(3) var<storage, read> z: array<f32>;
@group(0) @binding(4) var<storage, read_write> gram: array<f32>;

const THREADS: u32 = TILE / 8u * THREADS_N;
const QUADS: u32 = TILE / 4u;
// Tokens of a step: a thread fetches one vector for each of the two tiles.
const DEPTH: u32 = THREADS / QUADS;

// [token][column / 4]
var<workgroup> row_tile: array<vec4<f32>, THREADS>;
var<workgroup> column_tile: array<vec4<f32>, THREADS>;

// Four columns of a token that are all inside.
fn fetch(job: Job, token: u32, column: u32) -> vec4<f32> {
    let e = job.z + token * job.rank + column;
    return vec4<f32>(z[e], z[e + 1u], z[e + 2u], z[e + 3u]);
}

// Four columns of a token anywhere; zero where they are outside.
fn fetch_checked(job: Job, token: u32, end: u32, column: u32) -> vec4<f32> {
    var values = vec4<f32>(0.0);
    if (token < end) {
        let e = job.z + token * job.rank + column;
        if (column < job.rank) { values.x = z[e]; }
        if (column + 1u < job.rank) { values.y = z[e + 1u]; }
        if (column + 2u < job.rank) { values.z = z[e + 2u]; }
        if (column + 3u < job.rank) { values.w = z[e + 3u]; }
    }
    return values;
}

fn store_row(job: Job, part: u32, row: u32, column: u32, values: vec4<f32>) {
    if (row < job.rank) {
        let e = job.gram + (part * job.rank + row) * job.rank + column;
        if (column <= row) { gram[e] = values.x; }
        if (column + 1u <= row) { gram[e + 1u] = values.y; }
        if (column + 2u <= row) { gram[e + 2u] = values.z; }
        if (column + 3u <= row) { gram[e + 3u] = values.w; }
    }
}

// Adds the products of a token.
fn multiply(d: u32, row_quad: u32, column_quad: u32) {
    tile_step(
        row_tile[d * QUADS + row_quad],
        row_tile[d * QUADS + QUADS / 2u + row_quad],
        column_tile[d * QUADS + column_quad],
        column_tile[d * QUADS + QUADS - THREADS_N + column_quad],
    );
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let first_row = work.y * TILE;
    let first_column = work.z * TILE;
    let start = work.w * job.part_tokens;
    let end = min(start + job.part_tokens, job.tokens);

    let row_quad = tile_row_quad(t);
    let column_quad = tile_column_quad(t);

    let slot = t / QUADS;
    let row_at = first_row + t % QUADS * 4u;
    let column_at = first_column + t % QUADS * 4u;
    // Columns do not start after rows.
    let inside = first_row + TILE <= job.rank;
    // What is fetched for the next step while one is computed.
    var rows: vec4<f32>;
    var columns: vec4<f32>;
    if (inside && start + DEPTH <= end) {
        rows = fetch(job, start + slot, row_at);
        columns = fetch(job, start + slot, column_at);
    } else {
        rows = fetch_checked(job, start + slot, end, row_at);
        columns = fetch_checked(job, start + slot, end, column_at);
    }
    for (var token = start; token < end; token += DEPTH) {
        workgroupBarrier();
        row_tile[t] = rows;
        column_tile[t] = columns;
        workgroupBarrier();
        let next = token + DEPTH;
        if (next < end) {
            if (inside && next + DEPTH <= end) {
                rows = fetch(job, next + slot, row_at);
                columns = fetch(job, next + slot, column_at);
            } else {
                rows = fetch_checked(job, next + slot, end, row_at);
                columns = fetch_checked(job, next + slot, end, column_at);
            }
        }
        // Each step makes four, since compilers leave it a loop, and counting takes time.
        for (var d = 0u; d < DEPTH; d += 4u) {
            multiply(d, row_quad, column_quad);
            multiply(d + 1u, row_quad, column_quad);
            multiply(d + 2u, row_quad, column_quad);
            multiply(d + 3u, row_quad, column_quad);
        }
    }

    let low = first_row + row_quad * 4u;
    let high = low + TILE / 2u;
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
        let right = left + TILE / 2u;
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

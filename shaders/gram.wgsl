// Partial Gram matrices in f32: G = ZᵀZ over some tokens, lower triangle.
//
//   Z: tokens × rank, row-major, given as `parts` summands tokens × rank apart (see project.wgsl)
//   G: one rank × rank matrix for each part of the tokens, stored one after the other
//
// Work: (job, tile row, tile column, part). A workgroup makes one TILE × TILE tile of one partial G; only
// elements with row >= column are written. gram_reduce.wgsl adds the parts.
// Bindings: 3 Z, 4 partial G. The permutation sets TILE, COLUMNS and THREADS_N = TILE /
// COLUMNS; see tile_f32.wgsl.

#import params
#import tile_f32

struct Job {
    z: u32,     // first element
    gram: u32,  // first element
    tokens: u32,
    rank: u32,
    z_parts: u32,
    part_tokens: u32,   // tokens of a part
}

@group(0) @binding(3) var<storage, read> z: array<f32>;
@group(0) @binding(4) var<storage, read_write> gram: array<f32>;

const DEPTH: u32 = 8u;
const THREADS: u32 = TILE / 8u * THREADS_N;
const QUADS: u32 = TILE / 4u;
const QUADS_PER_THREAD: u32 = DEPTH * QUADS / THREADS;

// [token][column / 4]
var<workgroup> row_tile: array<vec4<f32>, DEPTH * QUADS>;
var<workgroup> column_tile: array<vec4<f32>, DEPTH * QUADS>;

fn load(job: Job, token: u32, column: u32) -> f32 {
    if (column >= job.rank) {
        return 0.0;
    }
    var e = job.z + token * job.rank + column;
    var sum = z[e];
    for (var part = 1u; part < job.z_parts; part++) {
        e += job.tokens * job.rank;
        sum += z[e];
    }
    return sum;
}

fn load_quad(job: Job, token: u32, end: u32, column: u32) -> vec4<f32> {
    if (token >= end) {
        return vec4<f32>(0.0);
    }
    return vec4<f32>(
        load(job, token, column),
        load(job, token, column + 1u),
        load(job, token, column + 2u),
        load(job, token, column + 3u),
    );
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

    for (var token = start; token < end; token += DEPTH) {
        var rows: array<vec4<f32>, QUADS_PER_THREAD>;
        var columns: array<vec4<f32>, QUADS_PER_THREAD>;
        for (var q = 0u; q < QUADS_PER_THREAD; q++) {
            let slot = t + q * THREADS;
            let row = token + slot / QUADS;
            let column = (slot % QUADS) * 4u;
            rows[q] = load_quad(job, row, end, first_row + column);
            columns[q] = load_quad(job, row, end, first_column + column);
        }
        workgroupBarrier();
        for (var q = 0u; q < QUADS_PER_THREAD; q++) {
            row_tile[t + q * THREADS] = rows[q];
            column_tile[t + q * THREADS] = columns[q];
        }
        workgroupBarrier();
        for (var d = 0u; d < DEPTH; d++) {
            tile_step(
                row_tile[d * QUADS + row_quad],
                row_tile[d * QUADS + QUADS / 2u + row_quad],
                column_tile[d * QUADS + column_quad],
                column_tile[d * QUADS + QUADS - THREADS_N + column_quad],
            );
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

// The entries of a layer's updates, s_k·B_k·A_k, a tile of ROWS × COLUMNS at a time. Thread t makes those of rows
// 2·(t / QUADS) and the next one, and of columns 4·(t % QUADS) and the next three, each in one register.
//
//   A: rows × input      B: output × rank; f32, row-major
//
// The permutation says whether the tile is TRANSPOSED: of an update whose rows are its columns. Sums are made in the same
// order either way, so that an entry has the same bits wherever it is made. The kernel declares bindings 3 A and 4 B, and a
// Job with a, b, input, output and rank.

struct Member {
    a: u32,         // its first row of A
    b: u32,         // its first column of B
    rank: u32,
    scale: f32,
    // Magnitude that an entry must reach.
    threshold: f32,
    // Key of its chance.
    key_low: u32,
    key_high: u32,
    // What an entry is multiplied by once signs are elected.
    weight: f32,
    // Where the window of magnitudes.wgsl begins, and how many bits of a magnitude its buckets leave out.
    base: u32,
    shift: u32,
}

const ROWS: u32 = 64u;
const COLUMNS: u32 = 32u;
const DEPTH: u32 = 8u;

const PAIRS: u32 = 32u;
const QUADS: u32 = 8u;
// One more than there are, so that neighbours lie in different banks.
const PAIR_STRIDE: u32 = 33u;
const QUAD_STRIDE: u32 = 9u;

// [rank][pair of rows], [rank][quad of columns]
var<workgroup> row_tile: array<vec2<f32>, DEPTH * PAIR_STRIDE>;
var<workgroup> column_tile: array<vec4<f32>, DEPTH * QUAD_STRIDE>;

struct Quad {
    x: Real,
    y: Real,
    z: Real,
    w: Real,
}

// What a thread makes: four entries of each of two rows.
struct Entries {
    first: Quad,
    second: Quad,
}

fn quad_zero() -> Quad {
    return Quad(REAL_ZERO, REAL_ZERO, REAL_ZERO, REAL_ZERO);
}

fn a_value(job: Job, member: Member, d: u32, column: u32) -> f32 {
    if (d >= member.rank || column >= job.input) {
        return 0.0;
    }
    return a[job.a + (member.a + d) * job.input + column];
}

fn b_value(job: Job, member: Member, row: u32, d: u32) -> f32 {
    if (row >= job.output || d >= member.rank) {
        return 0.0;
    }
    return b[job.b + row * job.rank + member.b + d];
}

fn row_value(job: Job, member: Member, row: u32, d: u32) -> f32 {
    if (TRANSPOSED) {
        return a_value(job, member, d, row);
    }
    return b_value(job, member, row, d);
}

fn column_value(job: Job, member: Member, d: u32, column: u32) -> f32 {
    if (TRANSPOSED) {
        return b_value(job, member, column, d);
    }
    return a_value(job, member, d, column);
}

// Which rank and which pair of rows, or quad of columns, a thread brings: neighbours read neighbouring elements.
fn row_place(t: u32) -> vec2<u32> {
    if (TRANSPOSED) {
        return vec2(t / PAIRS, t % PAIRS);
    }
    return vec2(t % DEPTH, t / DEPTH);
}

fn column_place(t: u32) -> vec2<u32> {
    if (TRANSPOSED) {
        return vec2(t % DEPTH, t / DEPTH);
    }
    return vec2(t / QUADS, t % QUADS);
}

fn next_rows(job: Job, member: Member, first_row: u32, d: u32, t: u32) -> vec2<f32> {
    let place = row_place(t);
    let row = first_row + 2u * place.y;
    let k = d + place.x;
    return vec2(row_value(job, member, row, k), row_value(job, member, row + 1u, k));
}

// Zero for threads that bring none.
fn next_columns(job: Job, member: Member, first_column: u32, d: u32, t: u32) -> vec4<f32> {
    if (t >= DEPTH * QUADS) {
        return vec4(0.0);
    }
    let place = column_place(t);
    let column = first_column + 4u * place.y;
    let k = d + place.x;
    return vec4(
        column_value(job, member, k, column),
        column_value(job, member, k, column + 1u),
        column_value(job, member, k, column + 2u),
        column_value(job, member, k, column + 3u),
    );
}

// B comes first: products of pairs round otherwise the other way round.
fn add_product(row: f32, column: f32, sum: Real) -> Real {
    if (TRANSPOSED) {
        return real_mul_add_f32(column, row, sum);
    }
    return real_mul_add_f32(row, column, sum);
}

fn add_products(sum: Quad, row: f32, columns: vec4<f32>) -> Quad {
    return Quad(
        add_product(row, columns.x, sum.x),
        add_product(row, columns.y, sum.y),
        add_product(row, columns.z, sum.z),
        add_product(row, columns.w, sum.w),
    );
}

fn scaled(quad: Quad, scale: Real) -> Quad {
    return Quad(real_mul(quad.x, scale), real_mul(quad.y, scale), real_mul(quad.z, scale), real_mul(quad.w, scale));
}

// The entries of thread t; 0 outside. All threads must call it.
fn entries_of(job: Job, member: Member, first_row: u32, first_column: u32, t: u32) -> Entries {
    let row_at = row_place(t).x * PAIR_STRIDE + row_place(t).y;
    let column_at = column_place(t).x * QUAD_STRIDE + column_place(t).y;
    var rows = next_rows(job, member, first_row, 0u, t);
    var columns = next_columns(job, member, first_column, 0u, t);
    var first = quad_zero();
    var second = quad_zero();
    for (var d = 0u; d < member.rank; d += DEPTH) {
        workgroupBarrier();
        row_tile[row_at] = rows;
        if (t < DEPTH * QUADS) {
            column_tile[column_at] = columns;
        }
        workgroupBarrier();
        // What the next step needs is read while this one computes.
        rows = next_rows(job, member, first_row, d + DEPTH, t);
        columns = next_columns(job, member, first_column, d + DEPTH, t);
        for (var k = 0u; k < DEPTH; k++) {
            let pair = row_tile[k * PAIR_STRIDE + t / QUADS];
            let quad = column_tile[k * QUAD_STRIDE + t % QUADS];
            first = add_products(first, pair.x, quad);
            second = add_products(second, pair.y, quad);
        }
    }
    let scale = real(member.scale);
    return Entries(scaled(first, scale), scaled(second, scale));
}

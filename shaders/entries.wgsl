// Z = V·Mᵀ or, TRANSPOSED, Z = V·M, with M = rule(s_1·B_1·A_1, …, s_K·B_K·A_K), entry by entry: TIES and DARE without an
// update that is held anywhere.
//
//   V: directions × in      Z: directions × out (TRANSPOSED: the other way round); f32, row-major
//
// An entry of member k counts if its magnitude reaches the member's threshold and its hash is at most `chance`. With
// `elect`, what counts is averaged over the members that have the sign of its sum, before weights; else it is summed.
//
// Work: (job, first row of the tile, first direction, slot of its tally or NONE). A workgroup makes tile after tile of M
// along its columns and multiplies each by V: sums of 16·PER_THREAD directions, of which a thread has PER_THREAD that are
// 16 apart, for the 4 rows from 4·(t / 16) on.
// Bindings: 3 A, 4 B, 5 members, 6 V, 7 Z, 8 tallies: the sum of squares of entries, and of the signs of sums.

#import shared/params
#import real

struct Job {
    a: u32,             // first element
    b: u32,             // first element
    input: u32,         // columns of A
    output: u32,        // rows of B
    rank: u32,          // columns of B
    v: u32,             // first element
    z: u32,             // first element
    directions: u32,    // rows of V; if there are none, tallies are all that is wanted
    first_column: u32,  // of the tiles
    last_column: u32,
    add: u32,           // 1: add to Z what further columns give
    first_member: u32,
    last_member: u32,
    chance: u32,
    elect: u32,         // SUM, or what a sum of zero elects
    scale: f32,         // of what counts
}

const SUM: u32 = 0u;
const ELECT_PLUS: u32 = 1u;
const ELECT_MINUS: u32 = 2u;

const NONE: u32 = 0xffffffffu;

@group(0) @binding(3) var<storage, read> a: array<f32>;
@group(0) @binding(4) var<storage, read> b: array<f32>;
@group(0) @binding(5) var<storage, read> members: array<Member>;
@group(0) @binding(6) var<storage, read> v: array<f32>;
@group(0) @binding(7) var<storage, read_write> z: array<f32>;
@group(0) @binding(8) var<storage, read_write> tallies: array<vec2<f32>>;

#import shared/entry

alias Value = vec2<f32>;
#import shared/tree

// [column][pair of rows]
var<workgroup> m_tile: array<vec2<f32>, COLUMNS * PAIR_STRIDE>;

// Columns of V that are in workgroup memory at a time.
const V_COLUMNS: u32 = 8u;
const DIRECTIONS: u32 = 16u * PER_THREAD;
const V_STRIDE: u32 = DIRECTIONS + 1u;

// [column][direction]
var<workgroup> v_tile: array<f32, V_COLUMNS * V_STRIDE>;

fn step(v: u32) -> u32 {
    return v * 1664525u + 1013904223u;
}

// pcg3d (Jarzynski and Olano, JCGT 2020), its first word.
fn hash(row: u32, column: u32, member: Member) -> u32 {
    var x = step(row ^ member.key_high);
    var y = step(column);
    var z = step(member.key_low);
    x += y * z;
    y += z * x;
    z += x * y;
    x ^= x >> 16u;
    y ^= y >> 16u;
    z ^= z >> 16u;
    x += y * z;
    return x;
}

// What counts of one entry so far.
struct Election {
    plus: Real,
    minus: Real,
    weighted_plus: Real,
    weighted_minus: Real,
    // How many have each sign: plus in the lower half.
    counts: u32,
}

fn no_votes() -> Election {
    return Election(REAL_ZERO, REAL_ZERO, REAL_ZERO, REAL_ZERO, 0u);
}

// Row and column as the tile has them.
fn has_chance(job: Job, member: Member, row: u32, column: u32) -> bool {
    if (job.chance == 0xffffffffu) {
        return true;
    }
    if (TRANSPOSED) {
        return hash(column, row, member) <= job.chance;
    }
    return hash(row, column, member) <= job.chance;
}

fn vote(all: Election, job: Job, member: Member, row: u32, column: u32, value: Real) -> Election {
    let near = real_to_f32(value);
    var after = all;
    if (abs(near) >= member.threshold && has_chance(job, member, row, column)) {
        let weighted = real_mul(value, real(member.weight));
        if (near > 0.0) {
            after.plus = real_add(after.plus, value);
            after.weighted_plus = real_add(after.weighted_plus, weighted);
            after.counts += 1u;
        }
        if (near < 0.0) {
            after.minus = real_add(after.minus, value);
            after.weighted_minus = real_add(after.weighted_minus, weighted);
            after.counts += 0x10000u;
        }
    }
    return after;
}

// The merged entry, and the sign of the sum of what counts; 0 outside.
fn decided(job: Job, all: Election, row: u32, column: u32) -> vec2<f32> {
    let sum = real_to_f32(real_add(all.plus, all.minus));
    var merged = real_to_f32(real_add(all.weighted_plus, all.weighted_minus));
    if (job.elect != SUM) {
        if (sum > 0.0 || (sum == 0.0 && job.elect == ELECT_PLUS)) {
            merged = real_to_f32(all.weighted_plus) / f32(max(all.counts & 0xffffu, 1u));
        } else {
            merged = real_to_f32(all.weighted_minus) / f32(max(all.counts >> 16u, 1u));
        }
    }
    let inside = row < rows_of(job) && column < columns_of(job);
    return select(vec2(0.0), vec2(merged * job.scale, sign(sum)), inside);
}

fn rows_of(job: Job) -> u32 {
    if (TRANSPOSED) {
        return job.input;
    }
    return job.output;
}

fn columns_of(job: Job) -> u32 {
    if (TRANSPOSED) {
        return job.output;
    }
    return job.input;
}

fn v_value(job: Job, direction: u32, column: u32) -> f32 {
    if (direction >= job.directions || column >= job.last_column) {
        return 0.0;
    }
    return v[job.v + direction * columns_of(job) + column];
}

// Adds the products of one direction's element of V and the entries of four rows.
fn add_entries(sum: Quad, factor: f32, low: vec2<f32>, high: vec2<f32>) -> Quad {
    return Quad(
        real_mul_add_f32(factor, low.x, sum.x),
        real_mul_add_f32(factor, low.y, sum.y),
        real_mul_add_f32(factor, high.x, sum.z),
        real_mul_add_f32(factor, high.y, sum.w),
    );
}

fn store(job: Job, direction: u32, row: u32, sum: Real) {
    if (direction >= job.directions || row >= rows_of(job)) {
        return;
    }
    let e = job.z + direction * rows_of(job) + row;
    if (job.add != 0u) {
        z[e] = real_to_f32(real_add(real(z[e]), sum));
    } else {
        z[e] = real_to_f32(sum);
    }
}

fn store_rows(job: Job, direction: u32, row: u32, sums: Quad) {
    store(job, direction, row, sums.x);
    store(job, direction, row + 1u, sums.y);
    store(job, direction, row + 2u, sums.z);
    store(job, direction, row + 3u, sums.w);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let first_direction = work.z;
    // Of the entries that this thread makes.
    let row = work.y + 2u * (t / QUADS);
    // Of the sums that it has.
    let rows_at = t / 16u;
    let lane = t % 16u;
    var tally = vec2(0.0);
    var sums0 = quad_zero();
    var sums1 = quad_zero();
    var sums2 = quad_zero();
    var sums3 = quad_zero();
    var sums4 = quad_zero();
    for (var column = job.first_column; column < job.last_column; column += COLUMNS) {
        var all00 = no_votes();
        var all01 = no_votes();
        var all02 = no_votes();
        var all03 = no_votes();
        var all10 = no_votes();
        var all11 = no_votes();
        var all12 = no_votes();
        var all13 = no_votes();
        let j = column + 4u * (t % QUADS);
        for (var k = job.first_member; k < job.last_member; k++) {
            let member = members[k];
            let values = entries_of(job, member, work.y, column, t);
            all00 = vote(all00, job, member, row, j, values.first.x);
            all01 = vote(all01, job, member, row, j + 1u, values.first.y);
            all02 = vote(all02, job, member, row, j + 2u, values.first.z);
            all03 = vote(all03, job, member, row, j + 3u, values.first.w);
            all10 = vote(all10, job, member, row + 1u, j, values.second.x);
            all11 = vote(all11, job, member, row + 1u, j + 1u, values.second.y);
            all12 = vote(all12, job, member, row + 1u, j + 2u, values.second.z);
            all13 = vote(all13, job, member, row + 1u, j + 3u, values.second.w);
        }
        let m00 = decided(job, all00, row, j);
        let m01 = decided(job, all01, row, j + 1u);
        let m02 = decided(job, all02, row, j + 2u);
        let m03 = decided(job, all03, row, j + 3u);
        let m10 = decided(job, all10, row + 1u, j);
        let m11 = decided(job, all11, row + 1u, j + 1u);
        let m12 = decided(job, all12, row + 1u, j + 2u);
        let m13 = decided(job, all13, row + 1u, j + 3u);
        tally.x += m00.x * m00.x + m01.x * m01.x + m02.x * m02.x + m03.x * m03.x;
        tally.x += m10.x * m10.x + m11.x * m11.x + m12.x * m12.x + m13.x * m13.x;
        tally.y += m00.y + m01.y + m02.y + m03.y + m10.y + m11.y + m12.y + m13.y;
        if (job.directions == 0u) {
            continue;
        }
        // All threads have multiplied the last tile.
        workgroupBarrier();
        let at = 4u * (t % QUADS) * PAIR_STRIDE + t / QUADS;
        m_tile[at] = vec2(m00.x, m10.x);
        m_tile[at + PAIR_STRIDE] = vec2(m01.x, m11.x);
        m_tile[at + 2u * PAIR_STRIDE] = vec2(m02.x, m12.x);
        m_tile[at + 3u * PAIR_STRIDE] = vec2(m03.x, m13.x);
        for (var first = 0u; first < COLUMNS; first += V_COLUMNS) {
            workgroupBarrier();
            for (var e = t; e < V_COLUMNS * DIRECTIONS; e += 256u) {
                let c = e % V_COLUMNS;
                let d = e / V_COLUMNS;
                v_tile[c * V_STRIDE + d] = v_value(job, first_direction + d, column + first + c);
            }
            workgroupBarrier();
            for (var c = 0u; c < V_COLUMNS; c++) {
                let m_at = (first + c) * PAIR_STRIDE + 2u * rows_at;
                let low = m_tile[m_at];
                let high = m_tile[m_at + 1u];
                let v_at = c * V_STRIDE + lane;
                sums0 = add_entries(sums0, v_tile[v_at], low, high);
                if (PER_THREAD > 1u) {
                    sums1 = add_entries(sums1, v_tile[v_at + 16u], low, high);
                    sums2 = add_entries(sums2, v_tile[v_at + 32u], low, high);
                }
                if (PER_THREAD > 3u) {
                    sums3 = add_entries(sums3, v_tile[v_at + 48u], low, high);
                    sums4 = add_entries(sums4, v_tile[v_at + 64u], low, high);
                }
            }
        }
    }
    let to = work.y + 4u * rows_at;
    let direction = first_direction + lane;
    store_rows(job, direction, to, sums0);
    if (PER_THREAD > 1u) {
        store_rows(job, direction + 16u, to, sums1);
        store_rows(job, direction + 32u, to, sums2);
    }
    if (PER_THREAD > 3u) {
        store_rows(job, direction + 48u, to, sums3);
        store_rows(job, direction + 64u, to, sums4);
    }
    let all = sum_of_all(tally, t);
    if (t == 0u && work.w != NONE) {
        tallies[work.w] = all;
    }
}

// C = rule(s_1·B_1·A_1, …, s_K·B_K·A_K), entry by entry, for some rows of a layer: TIES and DARE without a whole update.
//
//   A: R × cols      B: rows × R      C: rows from first_row to last_row × cols; all f32, row-major
//
// An entry of member k counts if its magnitude reaches the member's threshold and its hash is at most `chance`. With
// `elect`, what counts is averaged over the members that have the sign of its sum, before weights; else it is summed.
// Work: (job, tile row, tile column, slot of its tally). A thread makes one entry of a 16 × 16 tile.
// Bindings: 3 A, 4 B, 5 members, 6 C, 7 tallies of each tile: its sum of squares, and of the signs of sums.

#import shared/params
#import real

struct Job {
    a: u32,         // first element
    b: u32,         // first element
    rows: u32,
    cols: u32,
    rank: u32,
    first_row: u32,
    last_row: u32,
    members: u32,   // how many
    chance: u32,
    elect: u32,     // SUM, or what a sum of zero elects
    scale: f32,     // of what counts
}

const SUM: u32 = 0u;
const ELECT_PLUS: u32 = 1u;
const ELECT_MINUS: u32 = 2u;

@group(0) @binding(3) var<storage, read> a: array<f32>;
@group(0) @binding(4) var<storage, read> b: array<f32>;
@group(0) @binding(5) var<storage, read> members: array<Member>;
@group(0) @binding(6) var<storage, read_write> c: array<f32>;
@group(0) @binding(7) var<storage, read_write> tallies: array<vec2<f32>>;

#import shared/entry

alias Value = vec2<f32>;
#import shared/tree

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

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let row = job.first_row + work.y * TILE + t / TILE;
    let column = work.z * TILE + t % TILE;

    var plus = REAL_ZERO;
    var minus = REAL_ZERO;
    var weighted_plus = REAL_ZERO;
    var weighted_minus = REAL_ZERO;
    var pluses = 0u;
    var minuses = 0u;
    for (var k = 0u; k < job.members; k++) {
        let member = members[k];
        let value = entry(job, member, row, column, t);
        let near = real_to_f32(value);
        if (abs(near) >= member.threshold && hash(row, column, member) <= job.chance) {
            let weighted = real_mul(value, real(member.weight));
            if (near > 0.0) {
                plus = real_add(plus, value);
                weighted_plus = real_add(weighted_plus, weighted);
                pluses += 1u;
            }
            if (near < 0.0) {
                minus = real_add(minus, value);
                weighted_minus = real_add(weighted_minus, weighted);
                minuses += 1u;
            }
        }
    }
    let sum = real_to_f32(real_add(plus, minus));
    var merged = real_to_f32(real_add(weighted_plus, weighted_minus));
    if (job.elect != SUM) {
        if (sum > 0.0 || (sum == 0.0 && job.elect == ELECT_PLUS)) {
            merged = real_to_f32(weighted_plus) / f32(max(pluses, 1u));
        } else {
            merged = real_to_f32(weighted_minus) / f32(max(minuses, 1u));
        }
    }
    merged *= job.scale;
    let inside = row < job.last_row && column < job.cols;
    if (inside) {
        c[(row - job.first_row) * job.cols + column] = merged;
    }

    let tally = sum_of_all(select(vec2(0.0), vec2(merged * merged, sign(sum)), inside), t);
    if (t == 0u) {
        tallies[work.w] = tally;
    }
}

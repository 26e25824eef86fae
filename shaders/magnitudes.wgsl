// Counts the magnitudes of a layer's updates: a histogram of the bits of |s_k·B_k·A_k| as f32, for each member.
//
// First by the upper 16 bits (the sign is gone); then, of entries whose upper bits are the member's
// `prefix`, by the lower 15. So two passes find the n-th largest magnitude exactly.
// Work: (job, tile row, tile column, member). A thread makes one entry of a 16 × 16 tile.
// Bindings: 3 A, 4 B, 5 members, 6 counts: BUCKETS for each member.

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
    upper: u32,     // 1: count by the upper bits
}

@group(0) @binding(3) var<storage, read> a: array<f32>;
@group(0) @binding(4) var<storage, read> b: array<f32>;
@group(0) @binding(5) var<storage, read> members: array<Member>;
@group(0) @binding(6) var<storage, read_write> counts: array<atomic<u32>>;

#import shared/entry

const BUCKETS: u32 = 65536u;
// How many bits the second pass counts by.
const LOWER_BITS: u32 = 15u;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let row = job.first_row + work.y * TILE + t / TILE;
    let column = work.z * TILE + t % TILE;
    let member = members[work.w];
    let bits = bitcast<u32>(real_to_f32(entry(job, member, row, column, t))) & 0x7fffffffu;
    if (row < job.last_row && column < job.cols) {
        if (job.upper != 0u) {
            atomicAdd(&counts[work.w * BUCKETS + (bits >> LOWER_BITS)], 1u);
        } else if (bits >> LOWER_BITS == member.prefix) {
            atomicAdd(&counts[work.w * BUCKETS + (bits & ((1u << LOWER_BITS) - 1u))], 1u);
        }
    }
}

// The entries of a layer's updates, s_k·B_k·A_k, a 16 × 16 tile at a time. The kernel declares bindings 3 A (R × cols, f32),
// 4 B (rows × R, f32) and 5 members, and a Job with a, b, rows, cols, rank and first_row.

struct Member {
    // Its ranks: columns of B, rows of A.
    start: u32,
    end: u32,
    scale: f32,
    // Magnitude that an entry must reach.
    threshold: f32,
    // Key of its chance.
    key_low: u32,
    key_high: u32,
    // What the first 16 bits must be, for magnitudes.wgsl.
    prefix: u32,
    // What an entry is multiplied by once signs are elected.
    weight: f32,
}

const TILE: u32 = 16u;

var<workgroup> a_tile: array<f32, TILE * TILE>;
var<workgroup> b_tile: array<f32, TILE * TILE>;

// The entry of this thread, row tile.y + t/16 and column tile.x + t%16; 0 outside. All threads must call it.
fn entry(job: Job, member: Member, row: u32, column: u32, t: u32) -> Real {
    let i = t / TILE;
    let j = t % TILE;
    var sum = REAL_ZERO;
    for (var d = member.start; d < member.end; d += TILE) {
        var b_value = 0.0;
        if (row < job.rows && d + j < member.end) {
            b_value = b[job.b + row * job.rank + d + j];
        }
        var a_value = 0.0;
        if (d + i < member.end && column < job.cols) {
            a_value = a[job.a + (d + i) * job.cols + column];
        }
        workgroupBarrier();
        b_tile[t] = b_value;
        a_tile[t] = a_value;
        workgroupBarrier();
        for (var k = 0u; k < TILE; k++) {
            sum = real_mul_add_f32(b_tile[i * TILE + k], a_tile[k * TILE + j], sum);
        }
    }
    return real_mul(sum, real(member.scale));
}

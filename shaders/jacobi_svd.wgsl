// Batched one-sided Jacobi SVD of square matrices, by rotations of rows until all are orthogonal:
//
//   J·A = Σ·Vᵀ, so A = U·Σ·Vᵀ with U = Jᵀ      A, J: order × order, row-major, Real, both in place
//
// J comes in as the identity. Rows of A go out as σ_i·v_iᵀ, unsorted; rows of J as u_iᵀ.
// One workgroup a matrix. A step is a round of a round-robin tournament: order / 2 pairs of rows that do not
// meet, 16 at a time, 16 lanes each. A sweep is a tournament; one that rotates nothing is the last.
// Rows whose squared norm is not above `floor` count as zero.
//
// status: for each matrix 1 once it has converged, and whether its current sweep has rotated.
// Work: (job, first step, end step): a launch makes some steps, so that none takes too long.
// Bindings: 3 A, 4 J, 5 status.

#import params
#import real

struct Job {
    matrix: u32,    // first element of A and of J
    order: u32,
    rounds: u32,    // of a sweep: order - 1 if even, else order
    floor: f32,
    tolerance: f32, // cosine between rows that count as orthogonal
}

@group(0) @binding(3) var<storage, read_write> a: array<Real>;
@group(0) @binding(4) var<storage, read_write> j: array<Real>;
@group(0) @binding(5) var<storage, read_write> status: array<u32>;

const LANES: u32 = 16u;
const PAIRS: u32 = 16u;

// Partial dot products of each lane: (p, p), (q, q), (p, q) of its pair; then, at lane 0, their sums.
var<workgroup> partial: array<Real, 3u * PAIRS * LANES>;
var<workgroup> rotated: atomic<u32>;
var<workgroup> converged: u32;

// tan of the smaller angle that makes rows with these products orthogonal
fn tangent(pp: Real, qq: Real, pq: Real) -> Real {
    let zeta = real_div(real_sub(qq, pp), real_add(pq, pq));
    let size = real_abs(zeta);
    // Its square may overflow.
    if (real_greater(size, real(1.0e9))) {
        return real_div(real(0.5), zeta);
    }
    let root = real_sqrt(real_add(real(1.0), real_mul(zeta, zeta)));
    let t = real_div(real(1.0), real_add(size, root));
    if (real_greater(REAL_ZERO, zeta)) {
        return real_sub(REAL_ZERO, t);
    }
    return t;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let index = work.x;
    let job = jobs[index];
    let n = job.order;
    let lane = t % LANES;
    let slot = t / LANES;
    if (t == 0u) {
        converged = status[2u * index];
        atomicStore(&rotated, status[2u * index + 1u]);
    }
    workgroupBarrier();

    for (var step = work.y; step < work.z; step++) {
        let round = step % job.rounds;
        if (round == 0u && step > 0u) {
            workgroupBarrier();
            if (t == 0u) {
                converged = max(converged, 1u - atomicLoad(&rotated));
                atomicStore(&rotated, 0u);
            }
            workgroupBarrier();
        }
        if (converged != 0u) {
            break;
        }
        for (var first = 0u; first < (job.rounds + 1u) / 2u; first += PAIRS) {
            let pair = first + slot;
            // Everyone moves round one place a round but the last, who stays.
            var p = (round + pair) % job.rounds;
            var q = (round + job.rounds - pair % job.rounds) % job.rounds;
            if (pair == 0u) {
                q = job.rounds;
            }
            // Of an odd number, one rests.
            let plays = pair < (job.rounds + 1u) / 2u && p < n && q < n;
            p = job.matrix + p * n;
            q = job.matrix + q * n;

            var pp = REAL_ZERO;
            var qq = REAL_ZERO;
            var pq = REAL_ZERO;
            if (plays) {
                for (var k = lane; k < n; k += LANES) {
                    let x = a[p + k];
                    let y = a[q + k];
                    pp = real_mul_add(x, x, pp);
                    qq = real_mul_add(y, y, qq);
                    pq = real_mul_add(x, y, pq);
                }
            }
            let place = slot * LANES;
            partial[place + lane] = pp;
            partial[256u + place + lane] = qq;
            partial[512u + place + lane] = pq;
            workgroupBarrier();
            if (lane < 3u) {
                let start = lane * 256u + place;
                var sum = partial[start];
                for (var k = 1u; k < LANES; k++) {
                    sum = real_add(sum, partial[start + k]);
                }
                partial[start] = sum;
            }
            workgroupBarrier();
            pp = partial[place];
            qq = partial[256u + place];
            pq = partial[512u + place];

            let least = real(job.floor);
            if (plays && real_greater(pp, least) && real_greater(qq, least)) {
                let norms = real_mul(real_sqrt(pp), real_sqrt(qq));
                if (real_greater(real_abs(pq), real_mul(norms, real(job.tolerance)))) {
                    let tan = tangent(pp, qq, pq);
                    let cos = real_div(real(1.0), real_sqrt(real_add(real(1.0), real_mul(tan, tan))));
                    let sin = real_mul(cos, tan);
                    for (var k = lane; k < n; k += LANES) {
                        let x = a[p + k];
                        let y = a[q + k];
                        a[p + k] = real_sub(real_mul(cos, x), real_mul(sin, y));
                        a[q + k] = real_add(real_mul(sin, x), real_mul(cos, y));
                        let u = j[p + k];
                        let v = j[q + k];
                        j[p + k] = real_sub(real_mul(cos, u), real_mul(sin, v));
                        j[q + k] = real_add(real_mul(sin, u), real_mul(cos, v));
                    }
                    if (lane == 0u) {
                        atomicStore(&rotated, 1u);
                    }
                }
            }
            // `partial` is read by all before it is written again.
            workgroupBarrier();
        }
        storageBarrier();
        workgroupBarrier();
    }

    if (t == 0u) {
        status[2u * index] = converged;
        status[2u * index + 1u] = atomicLoad(&rotated);
    }
}

// Batched one-sided Jacobi SVD of square matrices, by rotations of rows until all are orthogonal:
//
//   J·A = Σ·Vᵀ, so A = U·Σ·Vᵀ with U = Jᵀ      A, J: order × order
//
// Both lie beside each other, [A | J], Real, row-major, and are overwritten; J comes in as the identity. Rows of A go out
// as σ_i·v_iᵀ, unsorted; rows of J as u_iᵀ. In one more row: 1 once it has converged, and 1 if its current sweep has rotated.
// One workgroup a matrix. A step is a round of a round-robin tournament: order / 2 pairs of rows that do not
// meet, 32 at a time, 8 lanes each. A sweep is a tournament; one that rotates nothing is the last.
// Rows whose squared norm is not above `floor` count as zero.
//
// Work: (job, first step, end step): a launch makes some steps, so that none takes too long.
// Bindings: 3 [A | J].

#import shared/params
#import real

struct Job {
    rows: u32,      // first element
    order: u32,
    rounds: u32,    // of a sweep: order - 1 if even, else order
    floor: f32,
    tolerance: f32, // cosine between rows that count as orthogonal
}

@group(0) @binding(3) var<storage, read_write> rows: array<Real>;

const LANES: u32 = 8u;
const PAIRS: u32 = 32u;
// One more than the lanes, so that pairs lie in different banks.
const STRIDE: u32 = 9u;
const SUMS: u32 = PAIRS * STRIDE;

// Partial dot products of each lane: (p, p), (q, q), (p, q) of its pair; then, at lane 0, their sums.
var<workgroup> partial: array<Real, 3u * SUMS>;
var<workgroup> rotated: atomic<u32>;
var<workgroup> converged: u32;

// tan of the smaller angle that makes rows with these products orthogonal
fn tangent(pp: Real, qq: Real, pq: Real) -> Real {
    let zeta = real_div(real_sub(qq, pp), real_add(pq, pq));
    let size = real_abs(zeta);
    // The square of a zeta beyond this may overflow.
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

// Four elements of both rows, read before any is written: a compiler cannot know that they are not the same.
fn rotate(p: u32, q: u32, k: vec4<u32>, width: u32, cos: Real, sin: Real) {
    let last = width - 1u;
    let x0 = rows[p + k.x];
    let y0 = rows[q + k.x];
    let x1 = rows[p + min(k.y, last)];
    let y1 = rows[q + min(k.y, last)];
    let x2 = rows[p + min(k.z, last)];
    let y2 = rows[q + min(k.z, last)];
    let x3 = rows[p + min(k.w, last)];
    let y3 = rows[q + min(k.w, last)];
    store(p, q, k.x, x0, y0, cos, sin);
    if (k.y < width) {
        store(p, q, k.y, x1, y1, cos, sin);
    }
    if (k.z < width) {
        store(p, q, k.z, x2, y2, cos, sin);
    }
    if (k.w < width) {
        store(p, q, k.w, x3, y3, cos, sin);
    }
}

fn store(p: u32, q: u32, k: u32, x: Real, y: Real, cos: Real, sin: Real) {
    rows[p + k] = real_sub(real_mul(cos, x), real_mul(sin, y));
    rows[q + k] = real_add(real_mul(sin, x), real_mul(cos, y));
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let n = job.order;
    let width = 2u * n;
    let status = job.rows + n * width;
    let lane = t % LANES;
    let slot = t / LANES;
    if (t == 0u) {
        converged = select(0u, 1u, real_greater(rows[status], REAL_ZERO));
        atomicStore(&rotated, select(0u, 1u, real_greater(rows[status + 1u], REAL_ZERO)));
    }
    // Loaded like this, it is the same for all, as it has to be where barriers follow: browsers do not take it for granted.
    var done = workgroupUniformLoad(&converged);

    for (var step = work.y; step < work.z; step++) {
        let round = step % job.rounds;
        if (round == 0u && step > 0u) {
            workgroupBarrier();
            if (t == 0u) {
                converged = max(converged, 1u - atomicLoad(&rotated));
                atomicStore(&rotated, 0u);
            }
            done = workgroupUniformLoad(&converged);
        }
        if (done != 0u) {
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
            // Of an odd number of rows one rests.
            let plays = pair < (job.rounds + 1u) / 2u && p < n && q < n;
            p = job.rows + p * width;
            q = job.rows + q * width;

            var pp = REAL_ZERO;
            var qq = REAL_ZERO;
            var pq = REAL_ZERO;
            if (plays) {
                for (var k = lane; k < n; k += LANES) {
                    let x = rows[p + k];
                    let y = rows[q + k];
                    pp = real_mul_add(x, x, pp);
                    qq = real_mul_add(y, y, qq);
                    pq = real_mul_add(x, y, pq);
                }
            }
            let place = slot * STRIDE;
            if (first > 0u) {
                // `partial` is read by all before it is written again.
                workgroupBarrier();
            }
            partial[place + lane] = pp;
            partial[SUMS + place + lane] = qq;
            partial[2u * SUMS + place + lane] = pq;
            workgroupBarrier();
            if (lane < 3u) {
                let start = lane * SUMS + place;
                var sum = partial[start];
                for (var k = 1u; k < LANES; k++) {
                    sum = real_add(sum, partial[start + k]);
                }
                partial[start] = sum;
            }
            workgroupBarrier();
            pp = partial[place];
            qq = partial[SUMS + place];
            pq = partial[2u * SUMS + place];

            let least = real(job.floor);
            if (plays && real_greater(pp, least) && real_greater(qq, least)) {
                let norms = real_mul(real_sqrt(pp), real_sqrt(qq));
                if (real_greater(real_abs(pq), real_mul(norms, real(job.tolerance)))) {
                    let tan = tangent(pp, qq, pq);
                    let cos = real_div(real(1.0), real_sqrt(real_add(real(1.0), real_mul(tan, tan))));
                    let sin = real_mul(cos, tan);
                    for (var k = lane; k < width; k += 4u * LANES) {
                        rotate(p, q, vec4(k, k + LANES, k + 2u * LANES, k + 3u * LANES), width, cos, sin);
                    }
                    if (lane == 0u) {
                        atomicStore(&rotated, 1u);
                    }
                }
            }
        }
        storageBarrier();
        workgroupBarrier();
    }

    if (t == 0u) {
        rows[status] = real(f32(converged));
        rows[status + 1u] = real(f32(atomicLoad(&rotated)));
    }
}

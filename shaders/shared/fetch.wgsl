// Fetching pairs of neighbouring values of X and A for the tiles of a product.
// The kernel declares x_words, a and a Job with x, a, tokens, rank and width; the permutation sets DTYPE.
//
// What is fetched stays as raw words until it is stored: the first use of a value waits for it, so unpacking
// at once would fetch one after the other.

// A pair: one word of halves in .x, or two of f32.
alias Pair = vec2<u32>;

fn x_half(job: Job, e: u32) -> u32 {
    return (x_words[job.x + e / 2u] >> ((e & 1u) * 16u)) & 0xffffu;
}

// X[row, k] and X[row, k + 1]; both are inside, and the width is even.
fn fetch_x(job: Job, row: u32, k: u32) -> Pair {
    let e = row * job.width + k;
    if (DTYPE == F32) {
        return Pair(x_words[job.x + e], x_words[job.x + e + 1u]);
    }
    return Pair(x_words[job.x + e / 2u], 0u);
}

// X[row, k] and X[row, k + 1] anywhere; zero outside. `end` bounds k.
fn fetch_x_checked(job: Job, row: u32, k: u32, end: u32) -> Pair {
    if (row >= job.tokens || k >= end) {
        return Pair(0u, 0u);
    }
    let e = row * job.width + k;
    let both = k + 1u < end;
    var pair = Pair(0u, 0u);
    if (DTYPE == F32) {
        pair.x = x_words[job.x + e];
        if (both) {
            pair.y = x_words[job.x + e + 1u];
        }
        return pair;
    }
    pair.x = x_half(job, e);
    if (both) {
        pair.x |= x_half(job, e + 1u) << 16u;
    }
    return pair;
}

fn x_values(pair: Pair) -> vec2<f32> {
    if (DTYPE == F32) {
        return bitcast<vec2<f32>>(pair);
    }
    return unpack_halves(pair.x, DTYPE);
}

// A[row, k] and A[row, k + 1]; both are inside.
fn fetch_a(job: Job, row: u32, k: u32) -> vec2<f32> {
    let e = job.a + row * job.width + k;
    return vec2<f32>(a[e], a[e + 1u]);
}

// A[row, k] and A[row, k + 1] anywhere; zero outside. `end` bounds k.
fn fetch_a_checked(job: Job, row: u32, k: u32, end: u32) -> vec2<f32> {
    if (row >= job.rank || k >= end) {
        return vec2<f32>(0.0);
    }
    let e = job.a + row * job.width + k;
    var pair = vec2<f32>(a[e], 0.0);
    if (k + 1u < end) {
        pair.y = a[e + 1u];
    }
    return pair;
}

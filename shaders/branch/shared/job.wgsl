// What the kernels of feature-level selection share. A branch k changes features F0 (tokens × width) to
// F0 + U_k, with U_k = f_k·Z_k·B_kᵀ, where Z_k are columns starts[k] .. starts[k+1] of Z = X·A_catᵀ.

const MAX_BRANCHES: u32 = 8u;

const KL: u32 = 0u;
const DOT: u32 = 1u;
const ENERGY: u32 = 2u;

struct Job {
    tokens: u32,        // of the whole call
    first: u32,         // first token of this launch
    count: u32,         // tokens of this launch
    width: u32,         // channels of F0
    f0: u32,            // first word of token `first`
    b: u32,             // first vec4 of B_catᵀ (rank × width, padded to whole vec4)
    stride: u32,        // vec4 in a row of it
    rank: u32,          // of A_cat
    branches: u32,
    score: u32,
    parts: u32,         // that the channels are split into
    part_width: u32,    // a multiple of CHANNELS
    group: u32,         // tokens that choose together; 0: each for itself
    means: u32,         // first element of the groups' means in the scores
    running: u32,       // first element of this layer's running means, after which comes the number of tokens
    flags: u32,
    starts: array<u32, 9>,
    // For matrix units: columns of the halves of Z and B_cat, where each branch has its own.
    columns: u32,
    column_starts: array<u32, 9>,
    adapters: array<u32, 8>,    // of each branch
    factors: array<f32, 8>,     // of each branch, without the adapter's strength
    fixed: array<f32, 8>,       // weights that are chosen by the host
}

// How branch/choose.wgsl decides, and whether it finishes scores itself.
const FINISH: u32 = 1u;
const SOFT: u32 = 2u;
const NORMALISE: u32 = 4u;
const FIXED: u32 = 8u;
// Whether branch/means.wgsl updates the running means instead of writing those of groups.
const UPDATE_RUNNING: u32 = 16u;
// Whether B_cat has more bits than one half holds, for branch/split_b.wgsl.
const HAS_LOW: u32 = 32u;

// What the host changes between calls, with no need to encode anew.
struct Controls {
    inverse_temperature: f32,
    padding: array<f32, 3>,
    strengths: array<f32, 8>,   // of each adapter
}

@group(0) @binding(1) var<storage, read> jobs: array<Job>;

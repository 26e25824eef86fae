// A row whose values neighbouring threads of a subgroup share.

#import shared/exponents

// The largest exponent of a row that `lanes` neighbouring threads share, 4 or 8, each with those of its values.
fn largest_of_row(most: vec4<u32>, lanes: u32) -> u32 {
    var all = largest_of(most);
    all = max(all, subgroupShuffleXor(all, 1u));
    all = max(all, subgroupShuffleXor(all, 2u));
    if (lanes == 8u) {
        all = max(all, subgroupShuffleXor(all, 4u));
    }
    return all;
}

// The scale of such a row.
fn scale_of_row(most: vec4<u32>, lanes: u32) -> f32 {
    return scale_of(largest_of_row(most, lanes));
}

//! Layers, grouped for people: the same module of every block is one line.

use std::collections::BTreeMap;

/// The name with block numbers replaced: `transformer_blocks.*.attn.to_q`. A number is a block's if it follows
/// a plural (`blocks.0`, `layers_11`) or another block's number (`input_blocks_4_1`).
pub fn pattern(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    let mut counts = false;
    for part in name.split_inclusive(['.', '_']) {
        let word = part.trim_end_matches(['.', '_']);
        let is_number = !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit());
        if is_number && counts {
            text += "*";
            text += &part[word.len()..];
        } else {
            text += part;
            counts = word.ends_with('s');
        }
    }
    text
}

/// Groups items by a key, in the order in which the keys first come.
pub fn group<K: Ord + Clone, T>(items: impl IntoIterator<Item = (K, T)>) -> Vec<(K, Vec<T>)> {
    let mut places = BTreeMap::new();
    let mut groups: Vec<(K, Vec<T>)> = Vec::new();
    for (key, item) in items {
        let place = *places.entry(key.clone()).or_insert(groups.len());
        match groups.get_mut(place) {
            Some((_, items)) => items.push(item),
            None => groups.push((key, vec![item])),
        }
    }
    groups
}

/// `8`, or `4 to 16`.
pub fn range(values: impl IntoIterator<Item = usize>) -> String {
    let (min, max) = values.into_iter().fold((usize::MAX, 0), |(min, max), v| (min.min(v), max.max(v)));
    if min >= max { max.to_string() } else { format!("{min} to {max}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_block_numbers_are_replaced() {
        for (name, expected) in [
            ("transformer_blocks.0.attn.to_out.0", "transformer_blocks.*.attn.to_out.0"),
            ("transformer_blocks_11_ff_net_2", "transformer_blocks_*_ff_net_2"),
            ("input_blocks_4_1_proj_in", "input_blocks_*_*_proj_in"),
            ("blocks.3.ffn.0", "blocks.*.ffn.0"),
            ("norm1.linear", "norm1.linear"),
        ] {
            assert_eq!(pattern(name), expected);
        }
    }

    #[test]
    fn groups_keep_their_order() {
        assert_eq!(group([(2, 'a'), (1, 'b'), (2, 'c')]), [(2, vec!['a', 'c']), (1, vec!['b'])]);
        assert_eq!((range([4, 16, 8]), range([8]), range([])), ("4 to 16".into(), "8".into(), "0".into()));
    }
}

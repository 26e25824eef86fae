//! Counts and bytes in words, for what the library and the command say.

/// `1 layer`, `2 layers`.
pub(crate) fn count(n: usize, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn one_is_singular_and_none_is_plural() {
        assert_eq!(
            [0, 1, 2].map(|n| count(n, "shared layer")),
            ["0 shared layers", "1 shared layer", "2 shared layers"]
        );
    }
}

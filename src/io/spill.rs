//! Factors that no file holds: in memory, or, where there are many, in temporary files that are mapped. A merge of large
//! adapters computes gigabytes of them before it is written.

use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::disk::{File, mapped::Mapped};

/// Bytes of factors that are kept in memory, in the whole process.
const KEPT: usize = 256 << 20;
/// Smaller ones are not worth a mapping of their own.
const SMALL: usize = 64 << 10;

static HELD: AtomicUsize = AtomicUsize::new(0);

/// Values of a matrix.
#[derive(Debug)]
pub(crate) enum Values {
    Memory(Vec<f32>),
    Mapped(Mapped),
}

impl Values {
    pub fn new(values: Vec<f32>) -> Self {
        let bytes = size_of_val(values.as_slice());
        let before = HELD.fetch_add(bytes, Ordering::Relaxed);
        // A browser has no temporary files.
        let spills = cfg!(not(target_arch = "wasm32"));
        if spills && bytes >= SMALL && before.saturating_add(bytes) > KEPT {
            match mapped(&values) {
                Ok(map) => {
                    HELD.fetch_sub(bytes, Ordering::Relaxed);
                    return Self::Mapped(map);
                }
                // There may be room for it in memory all the same.
                Err(error) => tracing::debug!(%error, "cannot use a temporary file"),
            }
        }
        Self::Memory(values)
    }
}

impl Drop for Values {
    fn drop(&mut self) {
        if let Self::Memory(values) = self {
            HELD.fetch_sub(size_of_val(values.as_slice()), Ordering::Relaxed);
        }
    }
}

impl Deref for Values {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Memory(values) => bytemuck::cast_slice(values.as_slice()),
            Self::Mapped(map) => map,
        }
    }
}

/// Little-endian values in a file that has no name and goes with the map.
fn mapped(values: &[f32]) -> io::Result<Mapped> {
    let file = File::unnamed()?;
    file.write_at(bytemuck::cast_slice(values), 0)?;
    // It has no name, and nothing but this map holds it once this function returns: nobody can cut it short.
    file.map()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri maps no files")]
    fn a_map_holds_the_same_bytes() {
        let values: Vec<f32> = (0..1000).map(|i| i as f32 * 0.1).collect();
        let map = mapped(&values).unwrap();
        assert_eq!(&map[..], bytemuck::cast_slice::<f32, u8>(&values));
        assert_eq!(&Values::Mapped(map)[..], &Values::new(values)[..]);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri maps no files")]
    fn little_is_held() {
        let many: Vec<Values> = (0..40).map(|_| Values::new(vec![1.0; 4 << 20])).collect();
        // Others run beside it, and hold less than what is left.
        assert!(many.iter().filter(|v| matches!(v, Values::Mapped(_))).count() >= 24);
        assert!(many.iter().all(|v| v.len() == 16 << 20 && v[v.len() - 4..] == 1f32.to_le_bytes()));
    }
}

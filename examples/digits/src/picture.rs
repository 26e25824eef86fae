//! Samples as a picture: rows are methods, columns samples.

use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result};
use font8x8::legacy::BASIC_LEGACY;

use crate::data::SIDE;
use crate::table::Rows;

/// Pixels of the picture to a pixel of a sample.
const ZOOM: usize = 4;
/// Pixels between cells.
const GAP: usize = 4;
/// Of a letter.
const LETTER: usize = 8;
const BACKGROUND: u8 = 255;
const INK: u8 = 40;

/// A picture in shades of gray.
pub struct Picture {
    /// Columns of pixels.
    pub width: usize,
    /// Rows of pixels.
    pub height: usize,
    /// Row by row.
    pub pixels: Vec<u8>,
}

impl Picture {
    /// Draws samples, −1 black and 1 white, with their labels.
    pub fn grid(rows: &Rows) -> Self {
        let cell = SIDE * ZOOM + GAP;
        let names = rows.rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let left = names * LETTER + 2 * GAP;
        let top = LETTER + 2 * GAP;
        let width = left + rows.columns.len() * cell;
        let height = top + rows.rows.len() * cell;
        let mut picture = Self { width, height, pixels: vec![BACKGROUND; width * height] };
        for (column, label) in rows.columns.iter().enumerate() {
            picture.write(label, left + column * cell + (cell - GAP - LETTER) / 2, GAP);
        }
        for (row, (name, images)) in rows.rows.iter().enumerate() {
            let y = top + row * cell;
            picture.write(name, GAP, y + (cell - GAP - LETTER) / 2);
            for (column, image) in images.iter().enumerate() {
                picture.stamp(image, left + column * cell, y);
            }
        }
        picture
    }

    fn stamp(&mut self, image: &[f32], left: usize, top: usize) {
        for y in 0..SIDE * ZOOM {
            for x in 0..SIDE * ZOOM {
                let value = image[y / ZOOM * SIDE + x / ZOOM];
                self.pixels[(top + y) * self.width + left + x] = ((value + 1.0) * 127.5).round() as u8;
            }
        }
    }

    fn write(&mut self, text: &str, left: usize, top: usize) {
        for (i, letter) in text.chars().enumerate() {
            let glyph = BASIC_LEGACY.get(letter as usize).copied().unwrap_or_default();
            for (y, bits) in glyph.iter().enumerate() {
                for x in (0..LETTER).filter(|x| bits >> x & 1 == 1) {
                    self.pixels[(top + y) * self.width + left + i * LETTER + x] = INK;
                }
            }
        }
    }

    /// Writes a PNG file.
    pub fn save(&self, path: &Path) -> Result<()> {
        save(path, self.width, self.height, png::ColorType::Grayscale, &self.pixels)
    }
}

/// Writes a PNG file of 8 bits a channel.
pub fn save(path: &Path, width: usize, height: usize, color: png::ColorType, pixels: &[u8]) -> Result<()> {
    let file = std::fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut encoder = png::Encoder::new(BufWriter::new(file), width as u32, height as u32);
    encoder.set_color(color);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    Ok(writer.finish()?)
}

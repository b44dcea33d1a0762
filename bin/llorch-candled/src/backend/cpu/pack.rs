//! Weight matrices, repacked at load so that a lane computes a row.
//!
//! A [`PackedMatrix`] is a sequence of tiles of 16 rows, each a sequence of blocks, so a product reads memory from the first
//! byte to the last. A block of a quantised format has, for each 32 columns, a *chunk*: for every four columns the four values
//! of each of the 16 rows, 64 bytes of 8-bit values or half as many of 4-bit ones, and one or two planes of upper bits. The
//! scales follow the chunks, sixteen of each kind. No format takes more bits than in a file, except that
//!
//! - 6-bit scales and minima are whole bytes: 4.625 instead of 4.5 bits per weight for Q4_K, 5.625 instead of 5.5 for Q5_K;
//! - Q2_K and Q3_K have 4-bit values and scales of whole bytes: 5.125 and 4.56 bits per weight instead of 2.625 and 3.44.

use std::ops::Range;

use crate::backend::cpu::format::{Block, Format, dequantize};
use crate::backend::cpu::lanes::LANES;
use crate::backend::cpu::pages::prefer_large_pages;

/// Rows of a tile.
pub const TILE_ROWS: usize = LANES;

const _: () = assert!(TILE_ROWS == pool_core::lifecycle::TILE_ROWS as usize);

/// Bytes of a cache line. Tiles begin at multiples of it.
const LINE: usize = 64;

/// Bytes of sixteen half-precision floats.
pub(crate) const HALVES: usize = 2 * LANES;

/// The layout of the values of 32 columns and 16 rows in a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    /// 4 × 64 bytes: columns 8p + j in the lower halves of bytes 4 · row + j of part p, columns 8p + 4 + j in the upper halves.
    Nibbles,
    /// As `Nibbles`, and 64 bytes with the fifth bit of columns 4g + j at bit g of byte 4 · row + j.
    Fives,
    /// As `Nibbles`, and 2 × 64 bytes with two more bits of columns 16v + 4i + j at bit 2i of byte 4 · row + j of part v.
    Sixes,
    /// 8 × 64 bytes: columns 4g + j in bytes 4 · row + j of part g.
    Bytes,
}

impl Chunk {
    fn of(format: Format) -> Self {
        match format {
            Format::Q5_0 | Format::Q5_1 | Format::Q5_K => Self::Fives,
            Format::Q6_K => Self::Sixes,
            Format::Q8_0 => Self::Bytes,
            _ => Self::Nibbles,
        }
    }

    const fn bytes(self) -> usize {
        match self {
            Self::Nibbles => 256,
            Self::Fives => 320,
            Self::Sixes => 384,
            Self::Bytes => 512,
        }
    }

    /// Writes one chunk. `quants` are the values of 32 columns of each row.
    fn write(self, quants: [&[u8; 32]; TILE_ROWS], to: &mut [u8]) {
        /// Mask of the lower halves of four bytes.
        const LOWER: u32 = 0x0F0F_0F0F;
        let (to, planes) = to.split_at_mut(if self == Self::Bytes { 512 } else { 256 });
        for (row, quants) in quants.into_iter().enumerate() {
            let at = 4 * row;
            let quads: [u32; 8] =
                std::array::from_fn(|i| u32::from_le_bytes(quants.as_chunks().0[i]));
            let put =
                |line: &mut [u8], quad: u32| line[at..at + 4].copy_from_slice(&quad.to_le_bytes());
            if self == Self::Bytes {
                for (part, quad) in to.chunks_exact_mut(LINE).zip(quads) {
                    put(part, quad);
                }
                continue;
            }
            for (part, [first, second]) in to.chunks_exact_mut(LINE).zip(quads.as_chunks().0) {
                put(part, first & LOWER | (second & LOWER) << 4);
            }
            let bits = if self == Self::Fives { 1 } else { 2 };
            for (plane, quads) in planes.chunks_exact_mut(LINE).zip(quads.chunks(8 / bits)) {
                let upper = quads
                    .iter()
                    .enumerate()
                    .map(|(i, quad)| (quad >> 4 & LOWER) << (bits * i));
                put(plane, upper.fold(0, |all, bits| all | bits));
            }
        }
    }
}

impl Chunk {
    /// Reads the 32 values of a row.
    fn read(self, from: &[u8], row: usize, quants: &mut [u8]) {
        let at = 4 * row;
        let (quads, planes) = from.split_at(if self == Self::Bytes { 512 } else { 256 });
        for (group, quants) in quants.chunks_exact_mut(4).enumerate() {
            for (j, quant) in quants.iter_mut().enumerate() {
                if self == Self::Bytes {
                    *quant = quads[LINE * group + at + j];
                    continue;
                }
                let pair = quads[LINE * (group / 2) + at + j];
                *quant = pair >> (4 * (group % 2)) & 15;
                *quant |= match self {
                    Self::Fives => (planes[at + j] >> group & 1) << 4,
                    Self::Sixes => {
                        (planes[LINE * (group / 4) + at + j] >> (2 * (group % 4)) & 3) << 4
                    }
                    _ => 0,
                };
            }
        }
    }
}

/// The scales and minima after the chunks of a block.
#[derive(Debug, Clone, Copy)]
struct Tail {
    /// Number of integer scales of a row; each takes 16 bytes per tile.
    scales: usize,
    /// Number of integer minima of a row; every four take 64 bytes per tile.
    minima: usize,
    /// True if a half-precision minimum follows the half-precision scale.
    has_minimum: bool,
}

impl Tail {
    fn of(format: Format) -> Self {
        let (scales, minima, has_minimum) = match format {
            Format::Q4_1 | Format::Q5_1 => (0, 0, true),
            Format::Q2_K => (16, 16, true),
            Format::Q3_K | Format::Q6_K => (16, 0, false),
            Format::Q4_K | Format::Q5_K => (8, 8, true),
            _ => (0, 0, false),
        };
        Self {
            scales,
            minima,
            has_minimum,
        }
    }

    fn bytes(self) -> usize {
        (self.scales + self.minima) * LANES + HALVES * (1 + usize::from(self.has_minimum))
    }

    /// Reads the scales and minima of a row.
    fn read(self, from: &[u8], row: usize, block: &mut Block) {
        let (scales, from) = from.split_at(self.scales * LANES);
        let (minima, from) = from.split_at(self.minima * LANES);
        for (sixteen, scale) in block
            .scales
            .iter_mut()
            .enumerate()
            .take(16 * self.scales.min(1))
        {
            *scale = scales[sixteen * self.scales / 16 * LANES + row].cast_signed();
        }
        for (sixteen, minimum) in block
            .minima
            .iter_mut()
            .enumerate()
            .take(16 * self.minima.min(1))
        {
            let group = sixteen * self.minima / 16;
            *minimum = minima[group / 4 * LINE + 4 * row + [0, 2, 1, 3][group % 4]];
        }
        let half = |at: usize| u16::from_le_bytes([from[at + 2 * row], from[at + 2 * row + 1]]);
        block.scale = half(0);
        if self.has_minimum {
            block.minimum = half(HALVES);
        }
    }

    /// Writes the integer scales by group, then the integer minima, then scale and minimum. Four groups of minima are together,
    /// and the bytes of a row are in the order 0, 2, 1, 3, so that the even bytes are groups 0 and 1.
    fn write(self, blocks: &[Block; TILE_ROWS], to: &mut [u8]) {
        let (scales, to) = to.split_at_mut(self.scales * LANES);
        let (minima, to) = to.split_at_mut(self.minima * LANES);
        for (row, block) in blocks.iter().enumerate() {
            for (group, to) in scales.chunks_exact_mut(LANES).enumerate() {
                to[row] = block.scales[group * 16 / self.scales].cast_unsigned();
            }
            for (four, to) in minima.chunks_exact_mut(LINE).enumerate() {
                for (byte, group) in [0, 2, 1, 3].into_iter().enumerate() {
                    to[4 * row + byte] = block.minima[(4 * four + group) * 16 / self.minima];
                }
            }
            let at = 2 * row;
            to[at..at + 2].copy_from_slice(&block.scale.to_le_bytes());
            if self.has_minimum {
                to[HALVES + at..][..2].copy_from_slice(&block.minimum.to_le_bytes());
            }
        }
    }
}

/// Returns the number of bytes of a tile's block; for float formats, those of a column.
pub(crate) fn tile_block_bytes(format: Format) -> usize {
    match format {
        Format::F32 => 4 * LANES,
        Format::F16 | Format::BF16 => HALVES,
        _ => format.block_len() / 32 * Chunk::of(format).bytes() + Tail::of(format).bytes(),
    }
}

/// Returns the number of bytes of a tile, a multiple of 64.
fn tile_bytes(format: Format, columns: usize) -> usize {
    (columns / format.block_len() * tile_block_bytes(format)).next_multiple_of(LINE)
}

/// A weight matrix of `rows` × `columns`, in tiles of 16 rows. The last tile is padded with rows of zeros.
#[derive(Debug)]
pub struct PackedMatrix {
    format: Format,
    rows: usize,
    columns: usize,
    tile_bytes: usize,
    /// The tiles begin at `start`, which is a multiple of 64 in memory. The buffer is never reallocated.
    buffer: Vec<u8>,
    start: usize,
}

impl PackedMatrix {
    /// Returns a matrix of zeros, to be filled by [`parts_mut`](Self::parts_mut). The system provides its memory untouched, so
    /// the thread that fills a part is the first to touch it.
    ///
    /// # Panics
    ///
    /// Panics if `columns` is not a multiple of the format's block length.
    pub fn new(format: Format, rows: usize, columns: usize) -> Self {
        assert_eq!(
            columns % format.block_len(),
            0,
            "{format:?} rows can't have {columns} columns"
        );
        let tile_bytes = tile_bytes(format, columns);
        let mut buffer = vec![0; rows.div_ceil(TILE_ROWS) * tile_bytes + LINE - 1];
        prefer_large_pages(&mut buffer);
        let start = buffer.as_ptr().addr().next_multiple_of(LINE) - buffer.as_ptr().addr();
        Self {
            format,
            rows,
            columns,
            tile_bytes,
            buffer,
            start,
        }
    }

    /// Packs a matrix in the layout of a file, on this thread.
    ///
    /// # Panics
    ///
    /// Panics if `source` isn't `rows` rows of `columns`.
    pub fn pack(format: Format, rows: usize, columns: usize, source: &[u8]) -> Self {
        assert_eq!(
            source.len(),
            rows * format.row_bytes(columns),
            "the length of the matrix"
        );
        let mut packed = Self::new(format, rows, columns);
        for part in packed.parts_mut(usize::MAX) {
            part.pack(source);
        }
        packed
    }

    /// Returns the element type.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Returns the number of rows, without the padding of the last tile.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Returns the number of tiles.
    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Returns the number of bytes of all tiles, which a product reads.
    pub fn bytes(&self) -> usize {
        self.tiles() * self.tile_bytes
    }

    /// Returns the bytes of all tiles, one after the other.
    pub fn as_bytes(&self) -> &[u8] {
        &self.buffer[self.start..][..self.bytes()]
    }

    /// Returns the blocks of a tile.
    #[inline]
    pub(crate) fn tile(&self, tile: usize) -> &[u8] {
        let blocks = self.columns / self.format.block_len() * tile_block_bytes(self.format);
        &self.buffer[self.start + tile * self.tile_bytes..][..blocks]
    }

    /// Writes the numbers of a row to `out`, each the exact value rounded once to `f32`.
    ///
    /// # Panics
    ///
    /// Panics if the row does not exist, or if `out` isn't as long as a row.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows && out.len() == self.columns,
            "the row does not exist, or `out` has the wrong length"
        );
        let (tile, row) = (self.tile(row / TILE_ROWS), row % TILE_ROWS);
        let blocks = tile.chunks_exact(tile_block_bytes(self.format));
        let bytes = |block: &[u8], width: usize| {
            let mut bytes = [0; 4];
            bytes[..width].copy_from_slice(&block[row * width..(row + 1) * width]);
            bytes
        };
        for (block, out) in blocks.zip(out.chunks_exact_mut(self.format.block_len())) {
            match self.format {
                Format::F32 => dequantize(self.format, &bytes(block, 4), out),
                Format::F16 | Format::BF16 => dequantize(self.format, &bytes(block, 2)[..2], out),
                format => unpack(format, block, row).numbers(format, out),
            }
        }
    }

    /// Returns the tiles in parts of at most `tiles`, so that several threads can each pack a part.
    ///
    /// # Panics
    ///
    /// Panics if `tiles` is 0.
    pub fn parts_mut(&mut self, tiles: usize) -> impl Iterator<Item = PartMut<'_>> {
        assert!(tiles > 0, "a part needs at least one tile");
        let (format, rows, columns, tile_bytes) =
            (self.format, self.rows, self.columns, self.tile_bytes);
        let count = self.tiles();
        let bytes = &mut self.buffer[self.start..][..count * tile_bytes];
        // A matrix without columns has empty tiles, and nothing to pack.
        let part_bytes = tiles.min(count).max(1) * tile_bytes.max(1);
        bytes
            .chunks_mut(part_bytes)
            .enumerate()
            .map(move |(part, bytes)| {
                let first = part * tiles;
                let tiles = first..(first.saturating_add(tiles)).min(count);
                PartMut {
                    format,
                    rows,
                    columns,
                    tile_bytes,
                    tiles,
                    bytes,
                }
            })
    }
}

/// Some tiles of a [`PackedMatrix`], to be packed.
#[derive(Debug)]
pub struct PartMut<'a> {
    format: Format,
    rows: usize,
    columns: usize,
    tile_bytes: usize,
    tiles: Range<usize>,
    bytes: &'a mut [u8],
}

impl PartMut<'_> {
    /// Returns the range of these tiles in the matrix.
    pub fn tiles(&self) -> Range<usize> {
        self.tiles.clone()
    }

    /// Packs these tiles from `source`, the whole matrix in the layout of a file.
    ///
    /// # Panics
    ///
    /// Panics if `source` has fewer rows than the matrix.
    pub fn pack(self, source: &[u8]) {
        let row_bytes = self.format.row_bytes(self.columns);
        for (tile, to) in self
            .tiles
            .zip(self.bytes.chunks_exact_mut(self.tile_bytes.max(1)))
        {
            let first = tile * TILE_ROWS;
            let last = (first + TILE_ROWS).min(self.rows);
            let source = &source[first * row_bytes..last * row_bytes];
            pack_tile(self.format, self.columns, source, to);
        }
    }

    /// Packs each tile from the rows that `rows_of` returns for it: up to 16 rows of one matrix in the layout of a file. So a
    /// matrix can be assembled from several.
    ///
    /// # Panics
    ///
    /// Panics if `rows_of` returns incomplete rows or more than 16.
    pub fn pack_from<'s>(self, mut rows_of: impl FnMut(usize) -> &'s [u8]) {
        for (tile, to) in self.tiles.zip(self.bytes.chunks_exact_mut(self.tile_bytes)) {
            pack_tile(self.format, self.columns, rows_of(tile), to);
        }
    }
}

/// Extracts a row's part from a block of a tile.
fn unpack(format: Format, bytes: &[u8], row: usize) -> Block {
    let chunk = Chunk::of(format);
    let (chunks, tail) = bytes.split_at(format.block_len() / 32 * chunk.bytes());
    let mut block = Block::ZERO;
    for (from, to) in chunks
        .chunks_exact(chunk.bytes())
        .zip(block.quants.chunks_exact_mut(32))
    {
        chunk.read(from, row, to);
    }
    Tail::of(format).read(tail, row, &mut block);
    block
}

/// Packs up to 16 rows; missing rows are zeros.
fn pack_tile(format: Format, columns: usize, rows: &[u8], to: &mut [u8]) {
    let row_bytes = format.row_bytes(columns);
    assert_eq!(rows.len() % row_bytes, 0, "`rows` is not whole rows");
    assert!(
        rows.len() <= TILE_ROWS * row_bytes,
        "more than {TILE_ROWS} rows"
    );
    let block_bytes = format.block_bytes();
    let mut blocks = [Block::ZERO; TILE_ROWS];
    for (index, to) in to
        .chunks_exact_mut(tile_block_bytes(format))
        .take(columns / format.block_len())
        .enumerate()
    {
        let rows = rows.chunks_exact(row_bytes);
        let sources = rows.map(|row| &row[index * block_bytes..][..block_bytes]);
        if format.block_len() == 1 {
            for (to, element) in to.chunks_exact_mut(block_bytes).zip(sources) {
                to.copy_from_slice(element);
            }
        } else {
            for (block, source) in blocks.iter_mut().zip(sources) {
                block.read(format, source);
            }
            pack_block(format, &blocks, to);
        }
    }
}

fn pack_block(format: Format, blocks: &[Block; TILE_ROWS], to: &mut [u8]) {
    let chunk = Chunk::of(format);
    let chunks = format.block_len() / 32;
    let (quants, tail) = to.split_at_mut(chunks * chunk.bytes());
    for (i, to) in quants.chunks_exact_mut(chunk.bytes()).enumerate() {
        chunk.write(
            blocks
                .each_ref()
                .map(|block| &block.quants.as_chunks::<32>().0[i]),
            to,
        );
    }
    Tail::of(format).write(blocks, tail);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::testing::{Random, fill_moderate};

    #[test]
    fn tiles_are_aligned_and_take_the_stated_bits() {
        let bits =
            |format| tile_block_bytes(format) as f64 * 8.0 / 16.0 / format.block_len() as f64;
        let expected = [
            (Format::F32, 32.0),
            (Format::BF16, 16.0),
            (Format::Q4_0, 4.5),
            (Format::Q4_1, 5.0),
            (Format::Q5_0, 5.5),
            (Format::Q5_1, 6.0),
            (Format::Q8_0, 8.5),
            (Format::Q2_K, 5.125),
            (Format::Q3_K, 4.5625),
            (Format::Q4_K, 4.625),
            (Format::Q5_K, 5.625),
            (Format::Q6_K, 6.5625),
        ];
        for (format, expected) in expected {
            assert_eq!(bits(format), expected, "{format:?}");
            let packed = PackedMatrix::new(format, 33, 3 * format.block_len());
            assert_eq!(packed.tiles(), 3);
            for tile in 0..3 {
                assert_eq!(packed.tile(tile).as_ptr().addr() % 64, 0, "{format:?}");
            }
        }
    }

    #[test]
    fn a_row_reads_back_as_the_file_has_it() {
        let mut random = Random::new(10);
        for format in Format::ALL {
            let (rows, columns) = (35, 2 * format.block_len());
            let row_bytes = format.row_bytes(columns);
            let mut source = vec![0; rows * row_bytes];
            fill_moderate(format, &mut source, &mut random);
            let packed = PackedMatrix::pack(format, rows, columns, &source);
            for (row, source) in source.chunks_exact(row_bytes).enumerate() {
                let (mut expected, mut found) = (vec![0.0; columns], vec![0.0; columns]);
                dequantize(format, source, &mut expected);
                packed.row(row, &mut found);
                assert_eq!(found, expected, "{format:?}, row {row}");
            }
        }
    }

    #[test]
    fn packing_in_parts_equals_packing_at_once() {
        let mut random = Random::new(9);
        for format in Format::ALL {
            let (rows, columns) = (70, 2 * format.block_len());
            let row_bytes = format.row_bytes(columns);
            let mut source = vec![0; rows * row_bytes];
            fill_moderate(format, &mut source, &mut random);
            let expected = PackedMatrix::pack(format, rows, columns, &source);
            for tiles in 1..7 {
                let mut packed = PackedMatrix::new(format, rows, columns);
                std::thread::scope(|scope| {
                    for part in packed.parts_mut(tiles) {
                        scope.spawn(|| part.pack(&source));
                    }
                });
                assert_eq!(packed.as_bytes(), expected.as_bytes(), "{format:?}");
            }
            let mut packed = PackedMatrix::new(format, rows, columns);
            for part in packed.parts_mut(2) {
                let rows_of = |tile: usize| {
                    &source[tile * 16 * row_bytes..(tile * 16 + 16).min(rows) * row_bytes]
                };
                part.pack_from(rows_of);
            }
            assert_eq!(packed.as_bytes(), expected.as_bytes(), "{format:?}");
        }
    }

    #[test]
    fn a_matrix_may_be_empty() {
        let packed = PackedMatrix::pack(Format::Q4_K, 0, 256, &[]);
        assert_eq!((packed.tiles(), packed.bytes()), (0, 0));
        let packed = PackedMatrix::pack(Format::Q8_0, 5, 0, &[]);
        assert_eq!((packed.tiles(), packed.bytes()), (1, 0));
    }
}

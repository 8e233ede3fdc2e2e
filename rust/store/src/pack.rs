//! Writing weights into pages: read a chunk, convert it, copy A's rows or transpose B's.

use std::cell::RefCell;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::base::Dtype;
use crate::convert::{BadValue, convert};
use crate::files::RegisteredFile;
use crate::layout::{Layout, Piece, Position, Rows};
use crate::report::{Matrix, TensorReport};
use crate::{AdapterError, HostPages};

/// Elements that are read at a time (more only if a single row is longer): a chunk stays in the second-level cache.
const CHUNK_ELEMENTS: usize = 64 << 10;

/// Rows of B in the file that are transposed together: one rank's elements of a tile fill two cache lines of bf16, and
/// a tile of common ranks fits the first-level cache.
const TILE: usize = 64;

/// What packing did; of several parts, add them up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PackStats {
    /// Bytes of weights read.
    pub bytes_read: u64,
    /// Bytes of pages written, zeroed ones included.
    pub bytes_written: u64,
    /// Greatest absolute error that conversion to the base's dtype made.
    pub max_rounding_error: f32,
}

impl std::ops::AddAssign for PackStats {
    fn add_assign(&mut self, other: PackStats) {
        self.bytes_read += other.bytes_read;
        self.bytes_written += other.bytes_written;
        self.max_rounding_error = self.max_rounding_error.max(other.max_rounding_error);
    }
}

/// Buffers that a thread keeps from part to part.
#[derive(Default)]
struct Scratch {
    read: Vec<u8>,
    converted: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// One part being packed.
pub(crate) struct Packer<'a> {
    pub(crate) registered: &'a RegisteredFile,
    pub(crate) file: &'a File,
    pub(crate) layout: &'a Layout,
    pub(crate) tensors: &'a [TensorReport],
    /// The base's.
    pub(crate) dtype: Dtype,
    pub(crate) pages: &'a HostPages,
    pub(crate) cancel: &'a AtomicBool,
    pub(crate) stats: PackStats,
}

impl Packer<'_> {
    /// Fills the part's span: rows with weights, everything else with zeros.
    pub(crate) fn pack(mut self, part: usize) -> Result<PackStats, AdapterError> {
        SCRATCH.with_borrow_mut(|scratch| {
            let span = self.layout.span(part, self.pages.page_bytes() as u32);
            let mut filled = span.start;
            for piece in &self.layout.pieces[self.layout.parts[part].clone()] {
                self.zero(filled..piece.rows.start);
                self.zero_page_tails(&piece.rows);
                match piece.matrix {
                    Matrix::A => self.pack_a(piece, scratch)?,
                    Matrix::B => self.pack_b(piece, scratch)?,
                }
                self.zero_padding(piece);
                filled = piece.rows.end();
            }
            self.zero(filled..span.end);
            Ok(self.stats)
        })
    }

    /// A is `[rank, in]` in the file: whole rows are copied, several at a time if all of a row is kept.
    fn pack_a(&mut self, piece: &Piece, scratch: &mut Scratch) -> Result<(), AdapterError> {
        let (width, kept) = (u64::from(piece.width), piece.kept.len());
        let whole = kept as u64 == width;
        let rows_per_chunk = if whole { (CHUNK_ELEMENTS / kept).max(1) as u32 } else { 1 };
        let row_bytes = kept * self.dtype.bytes();
        let mut row = 0;
        while row < piece.rows.count {
            let rows = rows_per_chunk.min(piece.rows.count - row);
            let first_element = u64::from(row) * width + u64::from(piece.kept.start);
            let data = self.read(piece, first_element, rows as usize * kept, scratch)?;
            for (row, bytes) in (row..row + rows).zip(data.chunks_exact(row_bytes)) {
                let Position { page, offset } = piece.rows.position(row);
                self.pages.write(page, offset as usize, row_bytes, |out| out.copy_from_slice(bytes));
            }
            self.stats.bytes_written += data.len() as u64;
            row += rows;
        }
        Ok(())
    }

    /// B is `[out, rank]` in the file: a chunk of its rows becomes a column range of every row of the image.
    fn pack_b(&mut self, piece: &Piece, scratch: &mut Scratch) -> Result<(), AdapterError> {
        let (rank, kept) = (piece.rows.count as usize, piece.kept.len());
        let columns_per_chunk = (CHUNK_ELEMENTS / rank).max(1);
        let mut column = 0;
        while column < kept {
            let columns = columns_per_chunk.min(kept - column);
            let first_element = (u64::from(piece.kept.start) + column as u64) * rank as u64;
            let data = self.read(piece, first_element, columns * rank, scratch)?;
            match self.dtype.bytes() {
                2 => transpose::<2>(data, piece, column, self.pages),
                _ => transpose::<4>(data, piece, column, self.pages),
            }
            self.stats.bytes_written += data.len() as u64;
            column += columns;
        }
        Ok(())
    }

    /// Reads elements of a piece's tensor, as elements of the base's dtype.
    fn read<'s>(
        &mut self,
        piece: &Piece,
        first_element: u64,
        elements: usize,
        scratch: &'s mut Scratch,
    ) -> Result<&'s [u8], AdapterError> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(AdapterError::Cancelled);
        }
        let bytes = elements * piece.dtype.bytes();
        if scratch.read.len() < bytes {
            scratch.read.resize(bytes, 0);
        }
        let input = &mut scratch.read[..bytes];
        let offset = piece.file_offset + first_element * piece.dtype.bytes() as u64;
        self.registered.read_at(self.file, input, offset)?;
        self.stats.bytes_read += bytes as u64;
        let (data, error) = convert(input, piece.dtype, self.dtype, &mut scratch.converted)
            .map_err(|bad| self.name_bad_value(bad, piece, first_element))?;
        self.stats.max_rounding_error = self.stats.max_rounding_error.max(error);
        Ok(data)
    }

    fn name_bad_value(&self, bad: BadValue, piece: &Piece, first_element: u64) -> AdapterError {
        let tensor = &self.tensors[piece.tensor];
        let (name, value, columns) = (tensor.name.clone(), bad.value, tensor.shape[1]);
        let element = first_element + bad.index as u64;
        let (row, column) = (element / columns, element % columns);
        if bad.overflow {
            AdapterError::Overflow { name, value, row, column, dtype: self.dtype.name() }
        } else {
            AdapterError::NotFinite { name, value, row, column }
        }
    }

    /// What each page of the piece but the last leaves unused behind its rows.
    fn zero_page_tails(&mut self, rows: &Rows) {
        let page_bytes = self.pages.page_bytes() as u32;
        let mut next = rows.in_first_page;
        while next < rows.count {
            let last = rows.position(next - 1);
            let tail = Position { offset: last.offset + rows.row_bytes, ..last };
            self.zero(tail..Position { offset: page_bytes, ..last });
            next = next.saturating_add(rows.per_page);
        }
    }

    /// The bytes that round each row up to its alignment.
    fn zero_padding(&mut self, piece: &Piece) {
        let used = (piece.kept.len() * self.dtype.bytes()) as u32;
        if used == piece.rows.row_bytes {
            return;
        }
        for row in 0..piece.rows.count {
            let Position { page, offset } = piece.rows.position(row);
            let padding = offset + used..offset + piece.rows.row_bytes;
            self.zero(Position { page, offset: padding.start }..Position { page, offset: padding.end });
        }
    }

    fn zero(&mut self, range: Range<Position>) {
        let page_bytes = self.pages.page_bytes();
        for page in range.start.page..=range.end.page {
            let start = if page == range.start.page { range.start.offset as usize } else { 0 };
            let end = if page == range.end.page { range.end.offset as usize } else { page_bytes };
            if start < end {
                self.pages.write(page, start, end - start, |out| out.fill(0));
                self.stats.bytes_written += (end - start) as u64;
            }
        }
    }
}

/// `data` is `[columns, rank]`, elements of `N` bytes; row `r` of the piece gets its column `r` at `first_column`.
fn transpose<const N: usize>(data: &[u8], piece: &Piece, first_column: usize, pages: &HostPages) {
    let rank = piece.rows.count as usize;
    let elements = data.as_chunks::<N>().0;
    for (tile_index, tile) in elements.chunks(TILE * rank).enumerate() {
        let (columns, first_column) = (tile.len() / rank, first_column + tile_index * TILE);
        for row in 0..rank {
            let Position { page, offset } = piece.rows.position(row as u32);
            pages.write(page, offset as usize + first_column * N, columns * N, |out| {
                for (out, element) in out.as_chunks_mut::<N>().0.iter_mut().zip(tile[row..].iter().step_by(rank)) {
                    *out = *element;
                }
            });
        }
    }
}

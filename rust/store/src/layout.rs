//! Where every row of the image lies: `docs/architecture.md`, "The adapter image".

use std::ops::Range;

use crate::accounting::Module;
use crate::base::{GROUPS, MODULES};
use crate::header::Header;
use crate::report::Matrix;
use crate::{AdapterError, BaseSpec, Dtype};

/// 32-bit words that describe one module.
pub const MODULE_WORDS: usize = 12;

/// Rows start on, and are padded to, this many bytes.
const ALIGNMENT: u64 = 16;

/// A place in the image: a page and a byte in it. `offset` may be the page's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Position {
    pub(crate) page: u32,
    pub(crate) offset: u32,
}

/// Equal rows, one after the other, none across a page's end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rows {
    pub(crate) start: Position,
    pub(crate) row_bytes: u32,
    pub(crate) count: u32,
    /// How many lie in the first page.
    pub(crate) in_first_page: u32,
    /// How many lie in every further page but the last.
    pub(crate) per_page: u32,
}

impl Rows {
    /// Where row `row` begins.
    pub(crate) fn position(&self, row: u32) -> Position {
        debug_assert!(row < self.count);
        match row.checked_sub(self.in_first_page) {
            None => Position { page: self.start.page, offset: self.start.offset + row * self.row_bytes },
            Some(row) => Position {
                page: self.start.page + 1 + row / self.per_page,
                offset: row % self.per_page * self.row_bytes,
            },
        }
    }

    /// Just behind the last row.
    pub(crate) fn end(&self) -> Position {
        let last = self.position(self.count - 1);
        Position { offset: last.offset + self.row_bytes, ..last }
    }

    fn words(&self) -> [i32; 5] {
        [self.start.page, self.start.offset, self.row_bytes, self.in_first_page, self.per_page].map(|n| n as i32)
    }
}

/// One factor of one module: where it comes from and where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) matrix: Matrix,
    /// Index among the file's tensors.
    pub(crate) tensor: usize,
    pub(crate) dtype: Dtype,
    /// First byte in the file.
    pub(crate) file_offset: u64,
    /// Width of the factor in the file: `in` of A, `out` of B.
    pub(crate) width: u32,
    /// The part of the width that this tensor-parallel rank keeps: the elements of a row of the image.
    pub(crate) kept: Range<u32>,
    /// One row for each rank.
    pub(crate) rows: Rows,
}

/// The image of one adapter.
#[derive(Debug)]
pub(crate) struct Layout {
    /// In image order.
    pub(crate) pieces: Vec<Piece>,
    /// Pieces of each layer that has any: the units that threads can pack independently.
    pub(crate) parts: Vec<Range<usize>>,
    pub(crate) num_pages: u32,
    /// Bytes of all rows, without what pages leave unused between them.
    pub(crate) row_bytes: u64,
    pub(crate) words: Vec<i32>,
    pub(crate) page_layers: Vec<u16>,
}

impl Layout {
    /// Lays out modules that are sorted by layer and module.
    pub(crate) fn new(modules: &[Module], header: &Header, base: &BaseSpec) -> Result<Layout, AdapterError> {
        let mut layout = Layout {
            pieces: Vec::with_capacity(2 * modules.len()),
            parts: Vec::new(),
            num_pages: 0,
            row_bytes: 0,
            words: vec![0; base.num_layers as usize * MODULES.len() * MODULE_WORDS],
            page_layers: Vec::new(),
        };
        let mut cursor = Cursor { page: 0, offset: 0, page_bytes: base.page_bytes };
        for layer in modules.chunk_by(|a, b| a.layer == b.layer) {
            let first = layout.pieces.len();
            for group in GROUPS {
                for matrix in [Matrix::A, Matrix::B] {
                    for module in layer.iter().filter(|m| group.contains(&m.module)) {
                        layout.add(module, matrix, header, base, &mut cursor)?;
                    }
                }
            }
            layout.parts.push(first..layout.pieces.len());
        }
        let pages = cursor.page + 1;
        if pages > u64::from(base.max_adapter_pages) {
            return Err(AdapterError::TooManyPages { pages, limit: base.max_adapter_pages });
        }
        layout.num_pages = pages as u32;
        Ok(layout)
    }

    fn add(
        &mut self,
        module: &Module,
        matrix: Matrix,
        header: &Header,
        base: &BaseSpec,
        cursor: &mut Cursor,
    ) -> Result<(), AdapterError> {
        let shape = base.shape(module.module);
        let (tensor, width, kept) = match matrix {
            Matrix::A => (module.a, shape.in_features, shape.kept_in),
            Matrix::B => (module.b, shape.out_features, shape.kept_out),
        };
        let row_bytes = (kept.len() as u64 * base.dtype.bytes() as u64).next_multiple_of(ALIGNMENT);
        if row_bytes > base.page_bytes {
            let module = MODULES[module.module];
            return Err(AdapterError::RowTooLong { module, row_bytes, page_bytes: base.page_bytes });
        }
        let rows = cursor.place(row_bytes, module.rank);
        if cursor.page >= u64::from(base.max_adapter_pages) {
            // Refused in the end; the cursor goes on alone so that the message can say how many pages it takes.
            return Ok(());
        }
        self.row_bytes += row_bytes * u64::from(module.rank);
        self.page_layers.resize(cursor.page as usize + 1, module.layer);
        let words = &mut self.words[(module.layer as usize * MODULES.len() + module.module) * MODULE_WORDS..];
        words[0] = module.rank as i32;
        words[1] = module.scale.to_bits() as i32;
        let first_word = if matrix == Matrix::A { 2 } else { 7 };
        words[first_word..first_word + 5].copy_from_slice(&rows.words());
        self.pieces.push(Piece {
            matrix,
            tensor,
            dtype: header.tensors[tensor].dtype,
            file_offset: header.data_offset + header.tensors[tensor].begin,
            width,
            kept,
            rows,
        });
        Ok(())
    }

    /// The span of the image that a part fills, gaps included: up to the next part's first row. Spans of different
    /// parts do not overlap, and together they are the whole image.
    pub(crate) fn span(&self, part: usize, page_bytes: u32) -> Range<Position> {
        let start = self.pieces[self.parts[part].start].rows.start;
        let end = match self.parts.get(part + 1) {
            Some(next) => self.pieces[next.start].rows.start,
            None => Position { page: self.num_pages - 1, offset: page_bytes },
        };
        start..end
    }
}

/// The first free byte. Pages are counted beyond the limit, in 64 bits.
struct Cursor {
    page: u64,
    offset: u64,
    page_bytes: u64,
}

impl Cursor {
    /// Takes `count` rows. Rows that begin beyond what 32 bits can say are refused by the caller.
    fn place(&mut self, row_bytes: u64, count: u32) -> Rows {
        debug_assert!(count > 0 && row_bytes <= self.page_bytes);
        if self.offset + row_bytes > self.page_bytes {
            (self.page, self.offset) = (self.page + 1, 0);
        }
        let count = u64::from(count);
        let in_first_page = count.min((self.page_bytes - self.offset) / row_bytes);
        let per_page = self.page_bytes / row_bytes;
        let rows = Rows {
            start: Position { page: self.page as u32, offset: self.offset as u32 },
            row_bytes: row_bytes as u32,
            count: count as u32,
            in_first_page: in_first_page as u32,
            per_page: per_page as u32,
        };
        match count - in_first_page {
            0 => self.offset += count * row_bytes,
            further => {
                let last_page_rows = (further - 1) % per_page + 1;
                self.page += further.div_ceil(per_page);
                self.offset = last_page_rows * row_bytes;
            }
        }
        rows
    }
}

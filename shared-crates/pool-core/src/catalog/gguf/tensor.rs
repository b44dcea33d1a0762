//! Tensor descriptions and element types.

/// The element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GgmlType {
    pub(super) id: u32,
    pub(super) name: &'static str,
    pub(super) block_elements: u64,
    pub(super) block_bytes: u64,
}

/// All element types of known layout: id, name, elements per block, bytes per block.
const GGML_TYPES: &[(u32, &str, u64, u64)] = &[
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
];

impl GgmlType {
    /// Returns the type with this number, or `None` if its layout is unknown.
    pub fn from_id(id: u32) -> Option<Self> {
        GGML_TYPES.iter().find(|(known, ..)| *known == id).map(
            |&(id, name, block_elements, block_bytes)| Self {
                id,
                name,
                block_elements,
                block_bytes,
            },
        )
    }

    /// Returns the number of the type in the file.
    pub fn id(self) -> u32 {
        self.id
    }

    /// Returns the common name of the type, such as `Q4_K`.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// Returns the number of elements stored as one block.
    pub fn block_elements(self) -> u64 {
        self.block_elements
    }

    /// Returns the size of a block in bytes.
    pub fn block_bytes(self) -> u64 {
        self.block_bytes
    }
}

/// The location and shape of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name of the tensor, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Dimensions in the file's order; the first one is contiguous in memory.
    pub dims: Vec<u64>,
    /// Element type, which determines the size of a block.
    pub ty: GgmlType,
    /// Offset of the first byte, relative to [`GgufFile::data_offset`].
    pub offset: u64,
    /// Size in bytes.
    pub size_bytes: u64,
}

impl TensorInfo {
    /// Returns the number of elements.
    pub fn elements(&self) -> u64 {
        // The product was checked for overflow when the file was read.
        self.dims.iter().product()
    }
}

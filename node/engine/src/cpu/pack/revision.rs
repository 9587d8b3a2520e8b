//! The packed layout, byte by byte: files of packed weights are found by the revision of the layout,
//! so no change of it must go without another revision.

use millrace_shared::model::TensorType;

use crate::cpu::buffer::Arena;
use crate::cpu::kernels::format::LAYOUT_REVISION;
use crate::cpu::pack::Packed;

/// CRC32C of a matrix of 19 rows, packed in groups of 8 and of 16.
const LAYOUTS: [(TensorType, [u32; 2]); 18] = [
    (TensorType::Q4_0, [0xe13a737d, 0xdc8fe3a9]),
    (TensorType::Q4_1, [0x57101b1b, 0x6ba8258c]),
    (TensorType::Q4_K, [0x3c5816cc, 0x6ee7f66e]),
    (TensorType::Q8_0, [0x65dbb9e8, 0xbfba1ee]),
    (TensorType::Q6_K, [0x5f6621b5, 0x16f57391]),
    (TensorType::F32, [0x35be07d7, 0x35be07d7]),
    (TensorType::F16, [0x3d554ba2, 0x3d554ba2]),
    (TensorType::BF16, [0x3d554ba2, 0x3d554ba2]),
    (TensorType::Q5_0, [0x91b120ed, 0xac3aae6d]),
    (TensorType::Q3_K, [0x756718bc, 0x3b6bc5b0]),
    (TensorType::IQ4_NL, [0xe13a737d, 0xdc8fe3a9]),
    (TensorType::TQ1_0, [0xcad3f404, 0xc851fc26]),
    (TensorType::TQ2_0, [0x7f022752, 0x56f149fb]),
    (TensorType::Q5_1, [0x18af3a55, 0x5af824e]),
    (TensorType::Q5_K, [0x67a836a, 0x94fb3f7b]),
    (TensorType::Q2_K, [0xa0e00c63, 0x9e3ca0aa]),
    (TensorType::IQ4_XS, [0x8fb223ec, 0xef60ddd1]),
    (TensorType::MXFP4, [0x5b57b9e, 0xe07025ce]),
];

#[test]
fn another_layout_needs_another_revision() {
    assert_eq!(LAYOUT_REVISION, 3, "then the sums below are to be taken anew");
    let found = LAYOUTS.map(|(dtype, _)| {
        let sums = [8, 16].map(|r| {
            let mut state = 0x1234_5678_u32;
            let mut read = |_: usize, rows: &mut [u8]| {
                rows.iter_mut().for_each(|byte| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    // Numbers of a usual size, whatever the type.
                    *byte = (state >> 24) as u8 & 0x3f;
                });
                Ok(())
            };
            let mut arena = Arena::new("a test");
            let packed = Packed::pack(dtype, (19, 512), r, &mut arena, &mut read).unwrap();
            crc32c::crc32c(&packed.data)
        });
        (dtype, sums)
    });
    assert_eq!(found, LAYOUTS, "raise LAYOUT_REVISION: packed files have another layout");
}

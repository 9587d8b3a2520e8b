//! The packed layout, byte by byte: files of packed weights are found by the revision of the layout,
//! so no change of it must go without another revision.

use crate::cpu::buffer::Arena;
use crate::cpu::kernels::format::{Kind, LAYOUT_REVISION};
use crate::cpu::pack::Packed;

/// CRC32C of a matrix of 19 rows, packed in groups of 8 and of 16.
const LAYOUTS: [(Kind, [u32; 2]); 8] = [
    (Kind::Q4_0, [0xe13a737d, 0xdc8fe3a9]),
    (Kind::Q4_1, [0x57101b1b, 0x6ba8258c]),
    (Kind::Q4K, [0x3c5816cc, 0x6ee7f66e]),
    (Kind::Q8_0, [0x65dbb9e8, 0xbfba1ee]),
    (Kind::Q6K, [0x5f6621b5, 0x16f57391]),
    (Kind::F32, [0x35be07d7, 0x35be07d7]),
    (Kind::F16, [0x3d554ba2, 0x3d554ba2]),
    (Kind::Bf16, [0x3d554ba2, 0x3d554ba2]),
];

#[test]
fn another_layout_needs_another_revision() {
    assert_eq!(LAYOUT_REVISION, 1, "then the sums below are to be taken anew");
    let found = LAYOUTS.map(|(kind, _)| {
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
            let packed = Packed::pack(kind, (19, 512), r, &mut arena, &mut read).unwrap();
            crc32c::crc32c(&packed.data)
        });
        (kind, sums)
    });
    assert_eq!(found, LAYOUTS, "raise LAYOUT_REVISION: packed files have another layout");
}

//! Reader of headerless arrays, such as those of OLMo, whose names end with `.npy` although they
//! lack NumPy's header.

use super::{
    file::{TokenFile, damaged},
    layout::Width,
};
use crate::Error;
use std::path::Path;

/// Beginning of a file that NumPy wrote.
const NUMPY_MAGIC: &[u8] = b"\x93NUMPY";

pub(super) fn open(path: &Path, width: Width) -> Result<TokenFile, Error> {
    let opened = TokenFile::open_array(path, width)?;
    let start = opened.read_bytes(0, opened.bytes().min(NUMPY_MAGIC.len() as u64) as usize)?;
    if start == NUMPY_MAGIC {
        let path = path.display();
        return Err(Error::Data(format!(
            "{path} has a header of NumPy, and only headerless arrays are read: write it again \
             with numpy.load(\"{path}\").tofile(...)"
        )));
    }
    let bytes = opened.bytes();
    if !bytes.is_multiple_of(width.bytes() as u64) {
        let width = width.bytes();
        return Err(damaged(
            path,
            format!(
                "{bytes} bytes are no whole number of tokens of {width} bytes; is its dtype \
                 another one?"
            ),
        ));
    }
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_are_read_and_others_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("part-0.npy");
        std::fs::write(&path, [1, 2, 3, 4, 255, 255, 255, 255]).unwrap();
        let tokens = |width| open(&path, width).unwrap().read(0, 2).unwrap();
        assert_eq!(tokens(Width::U16), [0x201, 0x403]);
        assert_eq!(tokens(Width::U32), [0x0403_0201, 0xffff_ffff]);
        assert_eq!(open(&path, Width::U16).unwrap().len(), 4);
        let refused = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            open(&path, Width::U32).err().unwrap().to_string()
        };
        let short = refused(&[1, 2, 3, 4, 5, 6]);
        assert!(
            short.contains("6 bytes are no whole number of tokens of 4"),
            "{short}"
        );
        let header = refused(b"\x93NUMPY\x01\x00");
        assert!(header.contains("header of NumPy"), "{header}");
    }
}

//! The content of files without a name (ghost-file-*.img), as pieces of the image file.

use std::fs::File;

use super::{
    ImageDir, ImageError, ImageKind,
    check::Budget,
    proto::{GhostChunkEntry, GhostFileEntry},
};

/// A piece of the content. Between pieces the file has holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GhostPiece {
    /// Where in the file that was dumped.
    pub offset: u64,
    /// How long.
    pub len: u64,
    /// Where in the image.
    pub image_offset: u64,
}

/// A file without a name.
#[derive(Debug)]
pub struct Ghost {
    /// Its owner, mode and times.
    pub entry: GhostFileEntry,
    /// How long it is.
    pub size: u64,
    /// Its content, in order.
    pub pieces: Vec<GhostPiece>,
    /// The image, to copy the content from.
    pub image: File,
}

impl Ghost {
    /// Reads all but the content.
    pub fn read(dir: &ImageDir, id: u64) -> Result<Ghost, ImageError> {
        let mut reader = dir.reader(ImageKind::GhostFile.id(id))?;
        let entry: GhostFileEntry = reader.required()?;
        let mut pieces = Vec::new();
        if !entry.chunks() {
            let len = reader.remaining();
            if len > 0 {
                pieces.push(GhostPiece { offset: 0, len, image_offset: reader.skip(len)? });
            }
            let size = entry.size.unwrap_or(0).max(len);
            return Ok(Ghost { entry, size, pieces, image: reader.into_file() });
        }

        let mut budget = Budget::default();
        let mut end = 0;
        loop {
            let at = reader.position();
            let Some(GhostChunkEntry { len, off }) = reader.message()? else { break };
            budget.spend::<GhostPiece>(reader.path(), at, 0)?;
            let image_offset = reader.skip(len)?;
            end = match off.checked_add(len).filter(|&next| off >= end && next <= entry.size.unwrap_or(u64::MAX)) {
                Some(next) => next,
                None => {
                    let what = format!("the piece at {at} lies outside of the file ({len} bytes from {off})");
                    return Err(ImageError::Contradiction { file: reader.path().to_owned(), what });
                }
            };
            pieces.push(GhostPiece { offset: off, len, image_offset });
        }
        let size = entry.size.unwrap_or(end);
        Ok(Ghost { entry, size, pieces, image: reader.into_file() })
    }
}

//! Reading one image file. Nothing in it is believed: every length is held against what is there and against a cap
//! before memory is set aside for it.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    marker::PhantomData,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use prost::Message;

use super::{Head, IMG_COMMON_MAGIC, IMG_SERVICE_MAGIC, ImageError, ImageKind, check};

/// A file opened for reading, behind its magic.
#[derive(Debug)]
pub struct ImageReader {
    path: PathBuf,
    file: BufReader<File>,
    offset: u64,
    size: u64,
    scratch: Vec<u8>,
}

impl ImageReader {
    pub(super) fn new(path: PathBuf, file: File, size: u64, kind: ImageKind) -> Result<Self, ImageError> {
        // Most files are a few hundred bytes; a dump has thousands of them.
        let buffer = usize::try_from(size).unwrap_or(usize::MAX).clamp(16, 64 << 10);
        let mut reader =
            Self { path, file: BufReader::with_capacity(buffer, file), offset: 0, size, scratch: Vec::new() };
        reader.magic(kind)?;
        Ok(reader)
    }

    fn magic(&mut self, kind: ImageKind) -> Result<(), ImageError> {
        let common = match kind.head() {
            Head::Raw => return Ok(()),
            Head::Bare => None,
            Head::Common => Some(IMG_COMMON_MAGIC),
            Head::Service => Some(IMG_SERVICE_MAGIC),
        };
        let mut found = self.word("a magic")?;
        // Version 1 of the format has the kind's own magic at once.
        if Some(found) == common {
            found = self.word("a magic")?;
        }
        if found == kind.magic() {
            return Ok(());
        }
        Err(ImageError::Magic { file: self.path.clone(), offset: self.offset - 4, found, expected: kind.magic() })
    }

    /// The next message, or `None` at the end of the file.
    pub fn message<M: Message + Default>(&mut self) -> Result<Option<M>, ImageError> {
        if self.offset == self.size {
            return Ok(None);
        }
        let at = self.offset;
        let len = self.word("the length of a message")?.into();
        self.cap("a message", len, check::MESSAGE_MAX)?;
        self.left("a message", len)?;
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.resize(len as usize, 0);
        self.exact(&mut bytes)?;
        let message =
            M::decode(&*bytes).map_err(|source| ImageError::Decode { file: self.path.clone(), offset: at, source })?;
        // A single huge message should not keep its memory for all the small ones after it.
        if bytes.capacity() <= 1 << 20 {
            self.scratch = bytes;
        }
        Ok(Some(message))
    }

    /// The next message, which must be there.
    pub fn required<M: Message + Default>(&mut self) -> Result<M, ImageError> {
        let offset = self.offset;
        self.message()?.ok_or_else(|| ImageError::Truncated {
            file: self.path.clone(),
            offset,
            what: "a message",
            need: 4,
            left: 0,
        })
    }

    /// The only message of the file.
    pub fn only<M: Message + Default>(mut self) -> Result<M, ImageError> {
        let Some(message) = self.message()? else {
            return Err(ImageError::Count { file: self.path, found: 0 });
        };
        if self.offset != self.size {
            return Err(ImageError::Count { file: self.path, found: 2 });
        }
        Ok(message)
    }

    /// All messages of the file, one at a time.
    pub fn messages<M: Message + Default>(self) -> Messages<M> {
        Messages { reader: Some(self), kind: PhantomData }
    }

    /// The next `len` bytes, which belong to the message before.
    pub fn payload(&mut self, len: u64) -> Result<Vec<u8>, ImageError> {
        self.cap("data", len, check::PAYLOAD_MAX)?;
        self.left("data", len)?;
        let mut bytes = vec![0; len as usize];
        self.exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Passes the next `len` bytes over, and says where in the file they begin: what reads them with pread(2),
    /// copy_file_range(2) or splice(2) from [`ImageReader::as_fd`] needs no copy of them here.
    pub fn skip(&mut self, len: u64) -> Result<u64, ImageError> {
        self.left("data", len)?;
        let start = self.offset;
        let step = i64::try_from(len).map_err(|_| ImageError::TooLong {
            file: self.path.clone(),
            offset: start,
            what: "data",
            len,
            max: i64::MAX as u64,
        })?;
        self.file.seek_relative(step).map_err(|e| self.failed("lseek", e))?;
        self.offset += len;
        Ok(start)
    }

    /// Where the next byte is read from.
    pub fn position(&self) -> u64 {
        self.offset
    }

    /// How many bytes are left.
    pub fn remaining(&self) -> u64 {
        self.size - self.offset
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file itself, to be moved out for later reading by offset.
    pub fn into_file(self) -> File {
        self.file.into_inner()
    }

    fn word(&mut self, what: &'static str) -> Result<u32, ImageError> {
        self.left(what, 4)?;
        let mut word = [0; 4];
        self.exact(&mut word)?;
        Ok(u32::from_le_bytes(word))
    }

    fn exact(&mut self, into: &mut [u8]) -> Result<(), ImageError> {
        self.file.read_exact(into).map_err(|e| self.failed("read", e))?;
        self.offset += into.len() as u64;
        Ok(())
    }

    fn left(&self, what: &'static str, need: u64) -> Result<(), ImageError> {
        let left = self.remaining();
        if need <= left {
            return Ok(());
        }
        Err(ImageError::Truncated { file: self.path.clone(), offset: self.offset, what, need, left })
    }

    fn cap(&self, what: &'static str, len: u64, max: u64) -> Result<(), ImageError> {
        if len <= max {
            return Ok(());
        }
        Err(ImageError::TooLong { file: self.path.clone(), offset: self.offset, what, len, max })
    }

    fn failed(&self, call: &'static str, source: io::Error) -> ImageError {
        ImageError::File { file: self.path.clone(), offset: self.offset, call, source }
    }
}

impl AsFd for ImageReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.get_ref().as_fd()
    }
}

/// The messages of a file, one after the other; ends after the first error.
#[derive(Debug)]
pub struct Messages<M> {
    reader: Option<ImageReader>,
    kind: PhantomData<fn() -> M>,
}

impl<M: Message + Default> Iterator for Messages<M> {
    type Item = Result<M, ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        let item = self.reader.as_mut()?.message().transpose();
        if !matches!(item, Some(Ok(_))) {
            self.reader = None;
        }
        item
    }
}

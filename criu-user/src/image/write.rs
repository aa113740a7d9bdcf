//! Writing one image file: magic, messages with their length in front, bytes behind them.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use prost::Message;

use super::dir::Place;
use super::{ImageError, ImageKind, ImageName};

/// So much is gathered before it goes to the kernel. Most files are smaller: they are made when the dump is complete, each
/// by a single write.
const BUFFER: usize = 4 << 20;

/// A file under construction. It is complete after [`ImageWriter::finish`]; dropping it instead leaves it cut off, which
/// does no harm, because a dump without an inventory is none.
#[derive(Debug)]
pub struct ImageWriter {
    path: PathBuf,
    target: Target,
    buffer: Vec<u8>,
    /// How much the kernel has got.
    written: u64,
}

/// Where the bytes go.
#[derive(Debug)]
enum Target {
    File(File),
    /// To a file that is not there yet.
    Later(Arc<Place>, ImageName),
}

impl ImageWriter {
    pub(super) fn new(path: PathBuf, file: File, kind: ImageKind) -> Self {
        Self { path, target: Target::File(file), buffer: kind.header(), written: 0 }
    }

    /// The same for a file that is made when it is complete, or too large to wait.
    pub(super) fn later(place: Arc<Place>, name: ImageName) -> Self {
        let path = place.path_of(name);
        Self { path, buffer: name.kind.header(), target: Target::Later(place, name), written: 0 }
    }

    /// Appends a message.
    pub fn message<M: Message>(&mut self, message: &M) -> Result<(), ImageError> {
        let len = message.encoded_len();
        let max = super::check::MESSAGE_MAX;
        let word = u32::try_from(len).ok().filter(|&l| u64::from(l) <= max).ok_or_else(|| ImageError::TooLong {
            file: self.path.clone(),
            offset: self.position(),
            what: "a message",
            len: len as u64,
            max,
        })?;
        self.buffer.extend_from_slice(&word.to_le_bytes());
        message.encode_raw(&mut self.buffer);
        if self.buffer.len() >= BUFFER { self.flush() } else { Ok(()) }
    }

    /// Appends bytes that belong to the last message.
    pub fn payload(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        if self.buffer.len() + bytes.len() < BUFFER {
            self.buffer.extend_from_slice(bytes);
            return Ok(());
        }
        self.flush()?;
        self.file()?.write_all(bytes).map_err(|e| self.failed("write", e))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Appends `len` bytes read from `source`, which the kernel copies or moves by itself where it can (files, pipes,
    /// sockets). A source that ends too soon is an error.
    pub fn payload_from(&mut self, source: &mut File, len: u64) -> Result<(), ImageError> {
        self.flush()?;
        // On Linux this is copy_file_range, sendfile or splice, whichever the two files allow.
        let copied = io::copy(&mut source.take(len), self.file()?).map_err(|e| self.failed("copy into", e))?;
        self.written += copied;
        if copied < len {
            let short =
                io::Error::new(io::ErrorKind::UnexpectedEof, format!("only {copied} of {len} bytes were there"));
            return Err(self.failed("copy into", short));
        }
        Ok(())
    }

    /// Where the next byte will stand.
    pub fn position(&self) -> u64 {
        self.written + self.buffer.len() as u64
    }

    /// The file, with everything so far in it and its offset at the end, for splice(2) and the like.
    /// Tell how much was appended with [`ImageWriter::appended`].
    pub fn raw(&mut self) -> Result<BorrowedFd<'_>, ImageError> {
        self.flush()?;
        Ok(File::as_fd(self.file()?))
    }

    /// Counts bytes that were appended to [`ImageWriter::raw`] behind our back.
    pub fn appended(&mut self, len: u64) {
        self.written += len;
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Completes the file. On disk it is after [`ImageDir::commit`](super::ImageDir::commit).
    pub fn finish(mut self) -> Result<(), ImageError> {
        match &self.target {
            Target::Later(place, name) => place.take(*name, std::mem::take(&mut self.buffer)),
            Target::File(_) => self.flush(),
        }
    }

    /// Hands everything to the kernel, and gives the file.
    pub(super) fn into_file(mut self) -> Result<File, ImageError> {
        self.flush()?;
        match self.target {
            Target::File(file) => Ok(file),
            Target::Later(place, name) => place.make(name),
        }
    }

    /// The file, made now if it was not.
    fn file(&mut self) -> Result<&mut File, ImageError> {
        if let Target::Later(place, name) = &self.target {
            self.target = Target::File(place.make(*name)?);
        }
        match &mut self.target {
            Target::File(file) => Ok(file),
            Target::Later(..) => unreachable!("it was just made"),
        }
    }

    fn flush(&mut self) -> Result<(), ImageError> {
        if !self.buffer.is_empty() {
            let bytes = std::mem::take(&mut self.buffer);
            self.file()?.write_all(&bytes).map_err(|e| self.failed("write", e))?;
            self.written += bytes.len() as u64;
        }
        Ok(())
    }

    fn failed(&self, call: &'static str, source: io::Error) -> ImageError {
        ImageError::File { file: self.path.clone(), offset: self.written, call, source }
    }
}

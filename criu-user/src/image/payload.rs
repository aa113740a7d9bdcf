//! Messages that have bytes behind them, and how many.

use prost::Message;

use super::{
    ImageError, ImageReader, ImageWriter,
    proto::{
        BpfmapDataEntry, IpcMsg, IpcSemEntry, IpcShmEntry, PipeDataEntry, SkPacketEntry, TcpClientEntry, TcpStreamEntry,
    },
};

/// A message that tells how many bytes follow it.
pub trait WithPayload: Message + Default {
    /// The length of what follows is a multiple of this; the rest is zeros.
    const ALIGN: u64 = 1;

    /// How many bytes follow, without what fills them up.
    fn payload_len(&self) -> u64;
}

impl WithPayload for PipeDataEntry {
    fn payload_len(&self) -> u64 {
        self.bytes.into()
    }
}

impl WithPayload for SkPacketEntry {
    fn payload_len(&self) -> u64 {
        self.length.into()
    }
}

/// First what waits to be read, then what waits to be sent or acknowledged.
impl WithPayload for TcpStreamEntry {
    fn payload_len(&self) -> u64 {
        u64::from(self.inq_len) + u64::from(self.outq_len)
    }
}

impl WithPayload for TcpClientEntry {
    fn payload_len(&self) -> u64 {
        self.stream.payload_len()
    }
}

/// First the keys, then the values.
impl WithPayload for BpfmapDataEntry {
    fn payload_len(&self) -> u64 {
        u64::from(self.keys_bytes) + u64::from(self.values_bytes)
    }
}

impl WithPayload for IpcShmEntry {
    const ALIGN: u64 = 4;

    fn payload_len(&self) -> u64 {
        if self.in_pagemaps() { 0 } else { self.size }
    }
}

impl WithPayload for IpcSemEntry {
    const ALIGN: u64 = 8;

    fn payload_len(&self) -> u64 {
        2 * u64::from(self.nsems)
    }
}

/// Behind an `ipc_msg_entry`, as many of these as that says.
impl WithPayload for IpcMsg {
    const ALIGN: u64 = 8;

    fn payload_len(&self) -> u64 {
        self.msize.into()
    }
}

impl ImageReader {
    /// The next message and the bytes behind it, or `None` at the end of the file.
    pub fn message_with_payload<M: WithPayload>(&mut self) -> Result<Option<(M, Vec<u8>)>, ImageError> {
        let Some(message) = self.message::<M>()? else { return Ok(None) };
        let bytes = self.payload(message.payload_len())?;
        self.skip(padding::<M>(bytes.len() as u64))?;
        Ok(Some((message, bytes)))
    }

    /// The next message, and where the bytes behind it stand in the file, which are passed over.
    pub fn message_over_payload<M: WithPayload>(&mut self) -> Result<Option<(M, u64)>, ImageError> {
        let Some(message) = self.message::<M>()? else { return Ok(None) };
        let start = self.skip(message.payload_len())?;
        self.skip(padding::<M>(message.payload_len()))?;
        Ok(Some((message, start)))
    }
}

impl ImageWriter {
    /// Appends a message and the bytes behind it, of which there must be as many as the message says.
    pub fn message_with_payload<M: WithPayload>(&mut self, message: &M, bytes: &[u8]) -> Result<(), ImageError> {
        let (len, said) = (bytes.len() as u64, message.payload_len());
        if len != said {
            let what = format!("about to write {len} bytes of data behind a message that says {said}");
            return Err(ImageError::Contradiction { file: self.path().to_owned(), what });
        }
        self.message(message)?;
        self.payload(bytes)?;
        self.payload(&[0; 8][..padding::<M>(len) as usize])
    }
}

/// So many zeros fill up.
fn padding<M: WithPayload>(len: u64) -> u64 {
    len.wrapping_neg() % M::ALIGN
}

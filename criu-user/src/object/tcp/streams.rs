//! The images of all connections, read by several threads at once: they are many and small.

use std::collections::HashMap;

use crate::image::proto::{InetSkEntry, TcpStreamEntry};
use crate::image::{ImageDir, ImageError, ImageKind};
use crate::object::file::Planner;
use crate::object::inet::is_tcp;
use crate::object::sockopt::state;
use crate::parallel;

/// What an image has; `None` where there is no image, and an empty one has no message.
type Stream = Result<Option<Option<(TcpStreamEntry, Vec<u8>)>>, ImageError>;

/// What was read and not asked for yet, by inode.
#[derive(Debug, Default)]
pub struct Streams(Option<HashMap<u32, Stream>>);

/// The stream of a socket; all are read when the first is asked for.
pub fn of(entry: &InetSkEntry, cx: &mut Planner<'_>) -> Stream {
    if cx.shelf.get::<Streams>().0.is_none() {
        let sockets = cx.files.values().filter_map(|file| file.isk.as_ref());
        let wanted = sockets.filter(|isk| is_tcp(isk) && isk.state != state::LISTEN);
        let inodes: Vec<u32> = wanted.map(|isk| isk.ino).collect();
        let dir = cx.dir;
        let read = parallel::map(&inodes, |&ino| (ino, read(dir, ino)));
        cx.shelf.get::<Streams>().0 = Some(read.into_iter().collect());
    }
    let known = cx.shelf.get::<Streams>().0.as_mut().and_then(|all| all.remove(&entry.ino));
    known.unwrap_or_else(|| read(cx.dir, entry.ino))
}

fn read(dir: &ImageDir, ino: u32) -> Stream {
    for kind in [ImageKind::TcpStream, ImageKind::TcpTls] {
        match dir.reader(kind.id(ino.into())) {
            Err(ImageError::Missing { .. }) => {}
            Err(err) => return Err(err),
            Ok(mut reader) => return reader.message_with_payload().map(Some),
        }
    }
    Ok(None)
}

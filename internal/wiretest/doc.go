// Package wiretest has raw HTTP/2 peers for tests: both sides of a connection, frame by frame (RFC 9113), for all that
// libraries hide or refuse to do. It also has throwaway certificate authorities ([NewCA]) and a check for leaked
// goroutines ([CheckLeaks]).
//
// [Listen] and then [Listener.Accept] give the server's side, [Dial] the client's. Both are a [Conn]. A Conn reads in
// the background: it remembers every frame until the test takes it, and does by itself what any peer must do, unless
// its [Options] say otherwise: it sends SETTINGS first, acknowledges SETTINGS and PING, and grants new windows for the
// DATA that came.
//
//   - The Write methods put one frame on the wire, whatever the rules say; [Conn.Batch] puts several into one write.
//     A failed write is no failure of the test, for many tests provoke the peer to hang up; it is named when a later
//     wait fails. [Conn.SendData] is the one that obeys flow control.
//   - The Expect methods and [Conn.Next] take frames and fail the test if none comes within [Timeout].
//   - [Conn.Collect] takes all that the peer sends on one stream; [Half.Sequence] tells it in one line, as in
//     "HEADERS DATA HEADERS+END_STREAM". [Conn.CollectAll] makes sure that nothing came after it.
//
// A wait that fails ends the goroutine it runs in, like t.FailNow; run the main line of a test in the test's own
// goroutine. All connections, listeners and goroutines end with the test.
package wiretest

package main

import (
	"fmt"
	"io"
	"os"
	"regexp"
	"runtime"
	"strings"

	"golang.org/x/term"
)

// Control sequences of ECMA-48, which every terminal of today knows.
const (
	cursorHide  = "\x1b[?25l"
	cursorShow  = "\x1b[?25h"
	cursorUp    = "\x1b[%dF" // to the start of the line so many above
	clearToEOL  = "\x1b[K"
	clearToEnd  = "\x1b[J"
	clearScreen = "\x1b[H\x1b[J"
	styleBold   = "\x1b[1m"
	styleGreen  = "\x1b[32m"
	styleNormal = "\x1b[0m"
)

// screen writes to standard output: text that scrolls, and on a terminal a block below it that is redrawn in place.
// After the first failed write (the reader of a pipe has gone) it writes nothing more and keeps the error.
type screen struct {
	out io.Writer
	// live says that out is a terminal that understands control sequences.
	live  bool
	color bool
	size  func() (width, height int)
	// drawn is how many lines of the block are on screen, width and height what the terminal measured then.
	drawn, width, height int
	err                  error
}

// newScreen prepares a screen on out; plain refuses the live block.
func newScreen(out *os.File, plain bool) *screen {
	fd := int(out.Fd())
	s := &screen{out: out}
	s.live = !plain && term.IsTerminal(fd) && os.Getenv("TERM") != "dumb" &&
		// The old Windows console needs to be told; Windows Terminal does not.
		(runtime.GOOS != "windows" || os.Getenv("WT_SESSION") != "")
	s.color = os.Getenv("NO_COLOR") == "" // no-color.org
	s.size = func() (int, int) {
		width, height, err := term.GetSize(fd)
		if err != nil || width <= 0 || height <= 0 {
			return columns + 1, 24
		}
		return width, height
	}
	return s
}

func (s *screen) write(text string) {
	if s.err == nil {
		_, s.err = io.WriteString(s.out, text)
	}
}

// print writes lines that stay. A block on screen gives way to them.
func (s *screen) print(lines ...string) {
	s.write(s.home() + strings.Join(lines, "\n") + "\n")
}

// draw replaces the block. Lines are cut to the terminal's width, and the block to its height: what wraps or scrolls
// could not be overwritten.
func (s *screen) draw(lines []string) {
	width, height := s.size()
	up := s.up()
	if s.drawn > 0 && (width != s.width || height != s.height) {
		up = clearScreen // a terminal that changed its size has moved or wrapped the block, nobody can say where to
	}
	if len(lines) > height-1 {
		lines = lines[:max(height-1, 0)]
	}
	var b strings.Builder
	b.WriteString(cursorHide)
	b.WriteString(up)
	for _, line := range lines {
		line = clip(line, width-1)
		if s.color {
			line = paint(line)
		}
		b.WriteString(line + clearToEOL + "\n")
	}
	b.WriteString(clearToEnd)
	s.write(b.String())
	s.drawn, s.width, s.height = len(lines), width, height
}

// up moves to the first line of the block.
func (s *screen) up() string {
	if s.drawn == 0 {
		return ""
	}
	return fmt.Sprintf("\r"+cursorUp, s.drawn)
}

// home takes the block away and shows the cursor again; nothing where there is no block.
func (s *screen) home() string {
	if s.drawn == 0 {
		return ""
	}
	text := s.up() + clearToEnd + cursorShow
	s.drawn = 0
	return text
}

var (
	bars     = regexp.MustCompile(`#+`)
	headings = regexp.MustCompile(`^ (grpc_proxy demo:|BACKEND|RPC KIND).*$`)
)

// paint makes bars green and headings bold. It only adds sequences of no width.
func paint(line string) string {
	line = headings.ReplaceAllString(line, styleBold+"$0"+styleNormal)
	return bars.ReplaceAllString(line, styleGreen+"$0"+styleNormal)
}

# SPDX-License-Identifier: Apache-2.0
"""What ``profile_heads`` has a model read twice: two texts of some 600 tokens, written for it. Names, numbers, lists
and events, because what heads look up is such things."""

STATION = """\
Weather station at Harrow Point: handbook for the keeper

1. Daily readings. Read the barometer at 06:10, 12:10 and 18:10, before you touch any other instrument, and
write the figure down to the tenth of a millibar. Tap the glass once, gently, and wait ten seconds. The
thermometers hang in the white screen on the north lawn: the dry bulb on the left, the wet bulb on the right,
the two that keep the extremes on the lower rail. Open the door away from the sun, read from below so that
your breath does not warm the mercury, and close it again. Rain is measured once a day, in the morning. Pour
the can into the narrow glass; each full glass is ten millimetres. If there is snow, melt it indoors with a
known amount of warm water and take that amount off.

2. The wind. The vane on the roof turns a pen on the drum in the hall. Change the paper every Monday and mark
the hour with a pencil on both ends. In January the bearings freeze; a spoon of lamp oil, not more, frees
them. Mr Aldous Renner of Quay Street 14 repairs the cups, telephone 3318; he comes by the Thursday boat. Do
not climb the roof alone when the pen shows more than 25 knots.

3. The log. Every line has the date, the hour, the pressure, four temperatures, the wind, the cloud in
eighths, and your initials. Correct a mistake with one stroke, so that the old figure can still be read; never
rub anything out. At the end of a month add up the rain and work out the mean of the noon pressures. Copy both
into the green book, sign the page, and send the sheet to the office in Carlow before the fifth. The postage
is paid.

4. Stores. Keep at least 40 sheets of drum paper, six pens, two spare thermometers (numbers 7 and 12, in the
oak box), five litres of lamp oil and a dry cell for the lamp. What is used is replaced from the shop of Ines
Marchetti, who keeps an account for the station. Anything above nine pounds needs a letter first.

5. Storms. When the pressure falls by more than three millibars in three hours, raise the black cone on the
mast by day or two red lamps by night, ring the harbour at once and read the barometer every half hour until
it rises. Close the shutters on the west side, tie down the screen with the rope in the porch, and leave the
rain can where it is. In the storm of 1927 keeper Tomas Lindqvist read it 31 times in one night and was found
asleep over a log without a gap; that page hangs in the hall.

6. Visitors are welcome on Sunday afternoons. Show them the drum and the log, and let children tap the glass,
once.
"""

LETTER = """\
Dear Rosalind,

You asked what became of the seven clocks. I promised an answer in spring, and here it is, late as always.
After the auction in Bremen I followed the first one, the walnut clock with the painted moon, to a dentist
named Kasimir Vogt, who had paid 640 marks for it. He keeps it in his waiting room because, he says, people
who hear it tick forget why they came. It loses four minutes a week. I offered to set it right, but he would
not hear of it: the error is what he bought, he told me, since his father always came home four minutes late.

The second and third went together to a school in the hills above Trento. The teacher, Lucia Bonetti, lets the
eldest pupil wind them on Saturdays. One has no hands any more. They use it to learn to count, by listening:
sixty to a minute, and whoever first notices a missing stroke may leave early. I tried, sat there among
twenty-two children, and lost to a boy of eight called Nino, who never looked up from his drawing.

Of the fourth I found only the case. A joiner in Graz had made a cupboard for violins out of it. "What was
inside?" I asked. "Brass," he said, "and a slip of paper." He had kept the paper, bless him. It says: cleaned
11 March 1884, again 2 May 1901, do not oil the third wheel. So now we know who ruined the other three,
because all of those were oiled, and by the same hand. I am sending you the slip; put it with the key from
Aunt Beatrix's desk, the small one with the number 58.

The fifth clock is the one that you remember, with the ship that rocks. It stands in the hall of a hotel in
Varna, room keys on one side, postcards on the other. The porter, whose name is Petko, says that it struck
thirteen once, on the night his daughter was born, and never since. I believe him. I stayed three nights to be
sure, paid 75 a night, and heard nothing but twelve.

The sixth was stolen from a museum in Lyon in the year after the war and has not been seen. The seventh, my
dear, is in your own kitchen. Take it from the wall and look at the back plate, under the felt: you will find
a moon, scratched with a needle, the number 7, and the initials of the maker, J. W. Harcourt. You have been
boiling eggs by it for thirty years. The dentist would give a good deal for it. Do not sell.

I shall be home on the 19th by the late train. Ask Edmund to meet me with the cart, as I am bringing the
violin cupboard.

Your brother,
Leopold
"""

TEXTS = (STATION, LETTER)
INSTRUCTION = "\n\nRepeat the previous text:\n\n"
